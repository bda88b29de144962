"""``python -m subspan``: the ``subspan`` command, in the form that torchrun starts."""

from subspan.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
