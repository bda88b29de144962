"""``import subspan`` needs torch and nothing else."""

import os
import re
import subprocess
import sys
from pathlib import Path

import subspan

OPTIONAL = (
    "bitsandbytes", "datasets", "fira", "galore_torch", "jsonargparse", "matplotlib", "numpy", "rich", "safetensors",
    "scipy", "tensorboard", "tokenizers", "transformers", "wandb", "yaml",
)  # fmt: skip

PROGRAM = f"""
import sys
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(lambda name, *args: None if name.split(".")[0] in {OPTIONAL!r} else find(name, *args))
try:
    import numpy
except ModuleNotFoundError:
    pass
else:
    sys.exit("the block does not work")
import torch, subspan
model = torch.nn.Linear(16, 16)
for name in subspan.list_optimizers():
    optimizer = subspan.create(name, model, rank=2, total_steps=10)
    model(torch.ones(1, 16)).sum().backward()
    optimizer.step()
loaded = sorted(name for name in sys.modules if name.split(".")[0] in {OPTIONAL!r} or name.startswith("subspan.training"))
assert not loaded, loaded
print("done")
"""


def test_torch_alone():
    """With every optional package blocked the library imports and trains, and it loads no part of the harness."""
    env = {**os.environ, "PYTHONPATH": str(Path(subspan.__file__).parents[1])}
    result = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "done"


def test_the_compiler_is_imported_when_it_is_needed():
    """The names of the package are there without torch's compiler, whose import takes as long as torch's."""
    program = """
import sys, torch
before = "torch._dynamo" in sys.modules
import subspan
for name in subspan.__all__:
    getattr(subspan, name)
assert "torch._dynamo" not in sys.modules or before
"""
    env = {**os.environ, "PYTHONPATH": str(Path(subspan.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", program], env=env, check=True)


def test_public_names():
    """``__all__`` is complete and true."""
    assert all(hasattr(subspan, name) for name in subspan.__all__)
    public = {name for name in dir(subspan) if not name.startswith("_") and callable(getattr(subspan, name))}
    assert public <= set(subspan.__all__)


def test_distributed_is_asked_in_one_file():
    """Only ``distributed.py`` of the library imports torch.distributed; the harness, checkpoints and counters may."""
    root = Path(subspan.__file__).parent
    users = [
        path.relative_to(root).as_posix() for path in root.rglob("*.py") if "torch.distributed" in path.read_text()
    ]
    importers = [
        name for name in users if re.search(r"^\s*(import|from) torch.distributed", (root / name).read_text(), re.M)
    ]
    assert [name for name in importers if not name.startswith(("training/", "bench/", "checkpoints/", "costs/"))] == [
        "distributed.py"
    ]
