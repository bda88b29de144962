"""The tests pass whatever the shell that starts them does with SIGINT."""

import signal
import subprocess
import sys

import pytest
from support.pages import ROOT
from support.processes import environment


@pytest.mark.slow
def test_sigint_is_ignored_by_who_starts_them() -> None:
    """As with ``make check &``: a test sends SIGINT to its own process, another starts a process that does."""
    names = ["test_in_a_command", "test_while_torch_is_imported"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/cli/test_endings.py", "-k"]

    def ignore() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    done = subprocess.run(
        [*command, " or ".join(names)], cwd=ROOT, env=environment(), preexec_fn=ignore, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout
