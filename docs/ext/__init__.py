"""What the site needs besides Sphinx: a check of docstrings, a check of links, and equations without a script."""
