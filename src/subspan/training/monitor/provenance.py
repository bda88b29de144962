"""What made a result: version and commit of the code, Python, torch, the kind of machine."""

import os
import platform
import subprocess
from pathlib import Path

import torch

import subspan


def stamp() -> dict[str, str]:
    """The facts that records and results keep.

    ``commit`` ends in ``-dirty`` if the code has changed since. It is ``unknown`` if the code is in no repository of
    its own, or if git is not installed.
    """
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

    # A package installed inside another project's repository does not belong to that repository's commit.
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return "unknown"
    commit, changed = git("describe", "--always", "--abbrev=12"), git("status", "--porcelain", "--", ".")
    # Only changes of the code count: the record that a study appends to is tracked too.
    return "unknown" if commit is None else commit + ("-dirty" if changed else "")
