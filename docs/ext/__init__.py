"""What the site needs beside Sphinx: a check of docstrings, one of links."""
