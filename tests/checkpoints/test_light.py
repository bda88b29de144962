"""Checkpoints are for library users too: to import them loads neither the harness nor what it stands on."""

import os
import subprocess
import sys
from pathlib import Path

import subspan
from subspan import checkpoints

HEAVY = ("transformers", "tokenizers", "datasets", "jsonargparse", "rich", "yaml", "subspan.training")
MODULES = sorted(path.stem for path in Path(checkpoints.__file__).parent.glob("[a-z]*.py"))


def loaded(program: str) -> list[str]:
    """Run ``program`` in a process of its own, and return the heavy modules that it has loaded."""
    asked = f"print([name for name in {HEAVY!r} if name in sys.modules])"
    env = {**os.environ, "PYTHONPATH": str(Path(subspan.__file__).parents[1])}
    command = [sys.executable, "-c", f"import sys\n{program}\n{asked}"]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return eval(result.stdout)


def test_no_module_imports_the_harness() -> None:
    assert {"sharded", "writer", "directory"} <= set(MODULES)
    assert loaded("\n".join(f"import subspan.checkpoints.{name}" for name in MODULES)) == []


def test_saving_and_loading_does_not_either(tmp_path: Path) -> None:
    program = f"""
from pathlib import Path
import torch
from subspan.checkpoints.sharded import load_sharded, save_sharded
from subspan.checkpoints.writer import new_checkpoint
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.AdamW(model.parameters())
with new_checkpoint(Path({str(tmp_path)!r}), step=1, keep=1) as folder:
    save_sharded(folder, model, optimizer)
load_sharded(Path({str(tmp_path)!r}) / "step-000001", model, optimizer)
"""
    assert loaded(program) == []
