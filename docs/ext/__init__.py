"""What the site needs besides Sphinx: checks of docstrings and links, signatures, and equations without a script."""
