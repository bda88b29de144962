"""What made a result: version and commit of the code, Python, torch, the kind of machine."""

import os
import platform
import subprocess
from pathlib import Path

import torch

import subspan


def stamp() -> dict[str, str]:
    """As records and results keep it. ``commit`` ends in ``-dirty`` where the code was changed since; it is ``unknown``
    where
    the code is in no repository of its own, or git is not installed."""
    return {
        "subspan": subspan.__version__,
        "commit": _commit(Path(subspan.__file__).parent),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
    }


def _commit(source: Path) -> str:
    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(source), *words], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    # A package in an environment within another project's repository is not of that commit.
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return "unknown"
    commit, changed = git("describe", "--always", "--abbrev=12"), git("status", "--porcelain", "--", ".")
    # Of the code alone: the record that a study appends to is tracked too.
    return "unknown" if commit is None else commit + ("-dirty" if changed else "")
