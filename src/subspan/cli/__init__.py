"""The command line: a file for each command, settings from YAML files and flags, by jsonargparse."""

from subspan.cli.main import main

__all__ = ["main"]
