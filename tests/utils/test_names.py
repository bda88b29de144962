"""A parameter has one name, whatever wraps the model."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from subspan.utils.names import canonical_name, canonical_names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("weight", "weight"),
        ("layers.0.up.weight", "layers.0.up.weight"),
        ("module.layers.0.up.weight", "layers.0.up.weight"),
        ("_orig_mod.weight", "weight"),
        ("module._orig_mod.module.weight", "weight"),
        ("layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.up.weight", "layers.0.up.weight"),
        ("layers.module.0.weight", "layers.0.weight"),
        ("modules.submodule.module_list.weight", "modules.submodule.module_list.weight"),
        ("module", "module"),
        ("module.module", "module.module"),
        ("", ""),
    ],
)
def test_components_of_wrappers_are_dropped(name: str, expected: str) -> None:
    assert canonical_name(name) == expected
    assert canonical_name(expected) == expected


def test_names_that_torch_makes() -> None:
    """``torch.compile``, activation checkpointing and data parallelism, around the model and inside it."""
    plain = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    names = list(plain.state_dict())
    plain[1][0] = checkpoint_wrapper(torch.compile(plain[1][0]))
    wrapped = nn.DataParallel(torch.compile(plain))
    assert names != list(wrapped.state_dict(keep_vars=True))
    assert [canonical_name(name) for name, _ in wrapped.named_parameters()] == names
    assert [canonical_name(name) for name in wrapped.state_dict()] == names


def test_names_that_would_collide_are_kept() -> None:
    names = ["module.weight", "weight", "module.up.weight", "_orig_mod.module.down.weight"]
    assert canonical_names(names) == dict(
        zip(names, ["module.weight", "weight", "up.weight", "down.weight"], strict=True)
    )
    assert canonical_names([]) == {}
