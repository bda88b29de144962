"""What cannot be read of a checkpoint is the user's; every other failure on the way comes out as it is."""

from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from subspan.checkpoints import directory
from subspan.checkpoints.directory import load_part, load_weights, save_part
from subspan.utils.errors import InputError


def raising(error: Exception) -> Any:
    def raises(*_: object, **__: object) -> NoReturn:
        raise error

    return raises


@pytest.mark.parametrize("content", [b"", b"damaged", b"PK\x03\x04", "half"], ids=repr)
def test_a_damaged_part(content: bytes | str, tmp_path: Path) -> None:
    save_part(tmp_path, "training", {"step": 3, "tensor": torch.ones(40)})
    path = tmp_path / "training.pt"
    path.write_bytes(path.read_bytes()[:300] if isinstance(content, str) else content)
    with pytest.raises(InputError, match=r"training\.pt cannot be read \(\w+\); remove it, or continue an older one"):
        load_part(tmp_path, "training")


def test_a_part_that_the_system_does_not_give(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be read \(No such file or directory\); let it be read, or continue"):
        load_part(tmp_path, "training")


@pytest.mark.parametrize(
    "error", [MemoryError(), AttributeError("bug"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes")]
)
def test_a_part_that_may_be_sound(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is told to remove it."""
    monkeypatch.setattr(torch, "load", raising(error))
    with pytest.raises(type(error)) as caught:
        load_part(tmp_path, "training")
    assert caught.value is error


@pytest.mark.parametrize("place", ["canonical_names", "model_tensors"])
def test_a_fault_on_the_way_to_the_weights(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(directory, place, raising(ValueError("bug")))
    with pytest.raises(ValueError, match="bug") as caught:
        load_weights(tmp_path, nn.Linear(2, 2))
    assert not isinstance(caught.value, InputError)
