"""Starts the processes of a test, and bounds their time."""

import os
import subprocess
import sys
from pathlib import Path


def launch(script: Path, processes: int, *arguments: str, timeout: int = 600) -> subprocess.CompletedProcess[str]:
    """Run ``script`` on so many ranks by torchrun; fails with their messages if one of them does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(script.parent), *sys.path])}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]
    return done
