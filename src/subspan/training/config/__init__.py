"""The settings of a run, and how blanks are filled in."""
