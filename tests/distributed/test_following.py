"""An optimizer that is built before ``fully_shard`` takes the steps of one that is built after."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import following_worker
from support.processes import launch
from support.sharded_model import build

pytestmark = pytest.mark.distributed

CASES: list[tuple[str, dict[str, Any], str, str, int]] = [
    ("sara_adamw", {}, "plain", "swapped", 0),
    ("sara_adamw", {}, "plain", "left", 0),
    ("sara_adamw", {"proj_type": "right"}, "plain", "swapped", 5),
    ("sara_adamw_8bit", {"proj_type": "right", "min_8bit_size": 64}, "plain", "left", 5),
    ("golore_adamw", {}, "plain", "left", 0),
    ("sara_adamw", {"stagger": False}, "backward", "swapped", 0),
    ("sara_adamw", {"stagger": False}, "backward", "left", 0),
    ("rso_adamw", {}, "backward", "left", 5),
]


@pytest.mark.parametrize(("recipe", "settings", "execution", "how", "before"), CASES)
def test_equals_an_optimizer_built_last(
    tmp_path: Path, recipe: str, settings: dict[str, Any], execution: str, how: str, before: int
) -> None:
    """Whether its parameters are exchanged in the groups, as accelerate does, or stay there; also after some steps."""
    path = tmp_path / "run"
    launch(following_worker.main, 2, recipe, json.dumps(settings), execution, how, str(before), str(path))
    for rank in (0, 1):
        ours, reference = torch.load(f"{path}.{rank}.pt")
        begun = build().state_dict()
        for name, value in reference.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-12)
            assert not torch.equal(value, begun[name])


def test_what_cannot_follow_is_said(tmp_path: Path) -> None:
    """After a step with the rows of a wide matrix compressed, its state cannot be divided by rows."""
    done = launch(
        following_worker.main, 2, "sara_adamw", "{}", "plain", "swapped", "5", str(tmp_path / "run"), check=False
    )
    assert done.returncode != 0
    assert "is sharded over ranks now, and was not when it was stepped on last" in done.stderr
    assert "proj_type='right'" in done.stderr
