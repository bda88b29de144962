"""Two data-parallel processes: the model of one process with the whole batch, and r/in of the bytes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from backward import ddp_worker, unused_worker
from backward.ddp_worker import RANK, batches, build, optimizer_of
from support.processes import launch

from subspan.groups import EXCLUDED, select_linear

pytestmark = pytest.mark.distributed


def run(tmp_path: Path, *arguments: str) -> tuple[dict[str, Any], list[dict[str, torch.Tensor]]]:
    path = tmp_path / "-".join(arguments)
    launch(ddp_worker.main, 2, *arguments, str(path))
    weights = [torch.load(f"{path}.{rank}.pt", weights_only=True) for rank in (0, 1)]
    return json.loads(Path(f"{path}.json").read_text()), weights


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is sent of whole gradients, which no optimizer changes."""
    return run(tmp_path_factory.mktemp("dense"), "sara_adamw", "dense", "owner")[0]


CASES = [("golore_adamw", "owner"), ("rso_adamw", "owner"), ("sara_adamw", "mean"), ("galore_adamw", "owner"),
         ("sara_sketch_adamw", "mean"), ("golore_sketch_adamw", "owner")]  # fmt: skip


@pytest.mark.parametrize(("name", "select_from"), CASES)
def test_two_ranks(tmp_path: Path, name: str, select_from: str, dense: dict[str, Any]) -> None:
    """Both ranks have the same weights, bit for bit. With random bases, or those of the mean gradient, they are the
    weights of one process; a single rank's gradient chooses other bases.
    """
    report, (first, second) = run(tmp_path, name, "backward", select_from)
    assert all(torch.equal(first[key], second[key]) for key in first)
    model = build()
    optimizer = optimizer_of(name, model, "backward", "owner")
    for ids in batches():
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    distance = max((value - first[key]).abs().max().item() for key, value in model.state_dict().items())
    if name == "galore_adamw":
        assert distance > 1e-4
    else:
        assert distance < 1e-5  # transformers computes norms and losses in fp32

    layers = select_linear(build(), "all-linear", EXCLUDED).values()
    weights = sum(8 * layer.weight.numel() for layer in layers)
    columns = RANK * (1 + ("sketch" in name))  # R, and a sketch of that width
    carriers = sum(8 * layer.weight.numel() * columns // layer.in_features for layer in layers)
    for ours, theirs in zip(report["bytes"], dense["bytes"], strict=True):
        assert theirs - ours == weights - carriers


UNUSED: list[tuple[str, dict[str, Any]]] = [
    ("rso_adamw", {}),
    ("rso_adamw", {"merge": "refresh", "targets": ["b", "c"]}),
    ("sara_adamw", {}),
    ("sara_adamw", {"select_from": "mean"}),
    ("galore_adamw", {"merge": "refresh", "targets": ["b"]}),
]


@pytest.mark.parametrize(("name", "settings"), UNUSED)
def test_layers_that_run_on_some_ranks_only(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    """The replicas stay equal bit for bit, and no rank waits for another. Where bases are drawn, they are those of one
    process that runs all of it.
    """
    launch(unused_worker.main, 2, name, json.dumps(settings), str(tmp_path / "run"))
    (first, refreshed), (second, others) = (torch.load(tmp_path / f"run.{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert refreshed == others
    assert len(refreshed) > 3
    begun = unused_worker.Branches().double()
    assert not any(torch.equal(first[key], value) for key, value in begun.state_dict().items())
    if name != "rso_adamw":
        return
    model = unused_worker.Branches().double()
    optimizer = unused_worker.optimizer_of(name, model, settings)
    for step in range(unused_worker.STEPS):
        for rank in (0, 1):
            (model(unused_worker.batch(step, rank), unused_worker.used(step, rank)).square().mean() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(first[key], value, rtol=1e-8, atol=1e-10)
