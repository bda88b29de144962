"""What the site needs beside Sphinx: a check of docstrings, one of links, equations without a script."""
