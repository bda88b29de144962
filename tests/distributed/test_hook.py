"""The hook of DistributedDataParallel that sends R: the weights of one process, and the bytes of R."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import hook_worker
from support.processes import launch
from support.sharded_model import RANK, batches, build, loss_of

import subspan
from subspan.ddp import register

CASES = [
    ("sara_adamw", {}), ("golore_sgd", {"proj_type": "left"}), ("galore_adafactor", {"stagger": True}),
    ("sara_sketch_adamw", {"residual": {"width": 4}}),
    ("golore_sketch_adamw", {"residual": {"width": 4, "draw": "coordinates"}, "proj_type": "left"}),
]  # fmt: skip


@pytest.mark.distributed
@pytest.mark.parametrize(("recipe", "settings"), CASES)
def test_equals_one_process(tmp_path: Path, recipe: str, settings: dict[str, Any]) -> None:
    """Thirty steps across refreshes; in an ordinary step a projected matrix costs R alone, and T with a sketch."""
    launch(hook_worker.main, 2, recipe, json.dumps(settings), str(tmp_path / "run"))
    runs = [torch.load(f"{tmp_path}/run.{rank}.pt") for rank in (0, 1)]
    model = build()
    optimizer = subspan.create(recipe, model, **{"lr": 1e-2, "rank": RANK, "update_proj_gap": 7, **settings})
    for x, y in batches():
        loss_of(model, x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    for key, value in model.state_dict().items():
        assert torch.equal(runs[0]["weights"][key], runs[1]["weights"][key])
        torch.testing.assert_close(runs[0]["weights"][key], value, rtol=1e-8, atol=1e-9)

    matrices = [p for p in model.parameters() if p.ndim > 1]
    side = (lambda p: p.shape[1]) if settings.get("proj_type") == "left" else (lambda p: max(p.shape))
    columns = RANK + settings.get("residual", {}).get("width", 0)
    saved = sum(8 * (p.numel() - columns * side(p)) for p in matrices)
    dense = sum(8 * p.numel() for p in model.parameters())
    ordinary = [(sent, whole) for refreshed, sent, whole in runs[0]["sent"] if not refreshed]
    assert len(ordinary) >= 10
    assert set(ordinary) == {(dense - saved, dense)}
    assert runs[0]["sent"][0] == (True, dense, dense)


@pytest.mark.distributed
def test_a_group_of_its_own(tmp_path: Path) -> None:
    """Two ranks, each a replica that averages with nobody: each trains on its own part, as a process alone would."""
    launch(hook_worker.alone, 2, str(tmp_path / "run"))
    for rank in (0, 1):
        model = build()
        optimizer = subspan.create("sara_adamw", model, lr=1e-2, rank=RANK, update_proj_gap=7)
        for x, y in batches():
            loss_of(model, *(part.chunk(2)[rank] for part in (x, y))).backward()
            optimizer.step()
            optimizer.zero_grad()
        theirs = torch.load(f"{tmp_path}/run.{rank}.pt")
        for key, value in model.state_dict().items():
            torch.testing.assert_close(theirs[key], value, rtol=1e-8, atol=1e-9)


def test_errors() -> None:
    model = build()
    optimizer = subspan.create("sara_adamw", model, rank=RANK)
    with pytest.raises(ValueError, match=r"a Sequential has no register_comm_hook; wrap it"):
        register(model, optimizer)
    model.register_comm_hook = lambda *_: None  # type: ignore[assignment]
    for recipe, words in (
        ("fira_adamw", "residual=Fira.*needs every gradient in full"),
        ("online_pca_adamw", "selector=OnlinePCA.*follows every gradient"),
        ("flora_adamw", "selector=Gaussian.*not orthonormal"),
    ):
        with pytest.raises(ValueError, match=words):
            register(model, subspan.create(recipe, model, rank=RANK))
    with pytest.raises(ValueError, match="a SGD has no subspace"):
        register(model, torch.optim.SGD(model.parameters()))  # type: ignore[arg-type]
