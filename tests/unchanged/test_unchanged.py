"""What was computed and saved before the folders were redrawn is computed and loaded after it, bit for bit."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from support.pages import module_of
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from subspan.checkpoints.checksums import seal
from subspan.cli import main

HERE = Path(__file__).parent
RUN = [
    "pretrain", "--tokenizer=bytes", "--optimizer=sara_adamw", "--steps=6", "--rank=4", "--sequence_length=16", "--threads=1",
    "--device=cpu", "--batch_size=2", "--update_proj_gap=3", "--evaluation.every=6", "--evaluation.tokens=32",
    "--checkpoint.every=2", "--checkpoint.keep=2", "--optim.proj_type=right",
]  # fmt: skip
"""The settings of both runs in ``saved``, stopped after step 4: one of one process, one of two under ``--parallel
fsdp``.
"""


def cases_module() -> ModuleType:
    """The script beside this file."""
    return module_of("unchanged/cases.py")


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What ``cases.py`` computes in a process whose kernels are the plainest."""
    command = [sys.executable, str(HERE / "cases.py")]
    done = subprocess.run(
        command, env=os.environ | cases_module().ENVIRONMENT, capture_output=True, text=True, check=True
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    answer: dict[str, Any] = json.loads((HERE / "digests.json").read_text())
    return answer


def test_numbers(found: dict[str, Any], recorded: dict[str, Any]) -> None:
    """Every listed optimizer and execution: the bits in fp32 and bf16, and the weights in fp64 wherever this runs."""
    assert {name: apart for name, apart in found["differences"].items() if not apart < 1e-9} == {}
    assert len(found["differences"]) * 2 == len(recorded["digests"])
    if found["kernels"] == recorded["kernels"]:  # else torch's own product of two matrices has other bits here
        assert found["digests"] == recorded["digests"]


def test_checkpoints(found: dict[str, Any], recorded: dict[str, Any]) -> None:
    """Every checkpoint loads, and the run that goes on from it takes the steps that it took then."""
    assert found["resumed"].keys() == recorded["resumed"].keys()
    if found["kernels"] == recorded["kernels"]:
        assert found["resumed"] == recorded["resumed"]


def test_a_checkpoint_of_torchs_own_format() -> None:
    """``torch.distributed.checkpoint`` asks the checkpoint for every key that the optimizer has now."""
    saved = torch.load(HERE / "checkpoints.pt", weights_only=True)["sara_adamw"]
    build = cases_module().cases()["sara_adamw"]
    model, optimizer = build(torch.float32)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    loaded = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(loaded, checkpoint_id=HERE / "saved" / "distributed")
    set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    assert optimizer.param_groups[0]["clock"] == saved["optimizer"]["param_groups"][0]["clock"] == 8
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, saved["model"][name], rtol=1e-4, atol=1e-5)
    assert all(int(state["step"]) == 8 for state in optimizer.state.values())


@pytest.mark.parametrize("kind", ["plain", "sharded"])
def test_runs(kind: str, tmp_path: Path) -> None:
    """A run whose checkpoint was saved then is continued now, and ends where it ended then."""
    shutil.copytree(HERE / "saved", tmp_path / "saved")
    folder = tmp_path / "saved" / kind
    move(folder, tmp_path / "saved")
    files = [
        f"--{name}={tmp_path / 'saved' / file}"
        for name, file in {"model": "config.json", "data": "corpus.jsonl"}.items()
    ]
    assert main([*RUN, *files, f"--out={folder}", "--resume=auto"]) == 0
    ended = load_file(folder / "checkpoints" / "step-000006" / "model.safetensors")
    for name, expected in load_file(HERE / "saved" / "ended.safetensors").items():
        torch.testing.assert_close(ended[name], expected, rtol=1e-4, atol=1e-5)


def move(folder: Path, place: Path) -> None:
    """Let the settings of the run name its files where they lie now; they were absolute paths."""
    checkpoint = folder / "checkpoints" / "step-000004"
    training = torch.load(checkpoint / "training.pt", weights_only=True)
    old = Path(training["settings"]["model"]).parent
    for key in ("model", "data"):
        training["settings"][key] = str(place / Path(training["settings"][key]).name)
    torch.save(training, checkpoint / "training.pt")
    (checkpoint / "checksums.json").unlink()  # a record does not name itself
    seal(checkpoint, "*.safetensors" if (checkpoint / "index.json").exists() else None)
    settings = folder / "config.yaml"
    settings.write_text(settings.read_text().replace(f"{old}/", f"{place}/"))
