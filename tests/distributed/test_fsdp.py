"""``fully_shard``: the weights and states of one process, no collective in an ordinary step, one Gram matrix in a
refresh.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import fsdp_worker
from support.processes import launch
from support.sharded_model import RANK, SMALLEST, batches, build, loss_of
from torch import Tensor

import subspan
from subspan.factory import residual_of

pytestmark = pytest.mark.distributed


METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "sara": ("sara_adamw", {}),
    "galore": ("galore_adamw", {"transfer": "rotate", "stagger": True}),
    "golore": ("golore_adamw", {}),
    "hybrid": ("golore_hybrid_adamw", {"total_steps": 30, "selector": {"at": 14}}),
    "fira": ("fira_adamw", {"weight_decay": 0.1}),
    "sketch": ("sara_sketch_adamw", {"weight_decay": 0.1, "residual": {"width": 4}}),
    "adafactor": ("sara_adafactor", {}),
    "adam_mini": ("sara_adam_mini", {"transfer": "moments"}),
    "8bit": ("sara_adamw_8bit", {"rank": 8}),
    "grass": ("grass_adamw", {}),
    # Of the wide weights the Gram matrix has more eigenvectors than the gradient has singular vectors.
    "floor": ("sara_adamw", {"selector": {"floor": 0.5}}),
    "cyclic": ("sara_adamw", {"selector": {"name": "cyclic"}}),
    "stratified": ("sara_adamw", {"selector": {"name": "stratified"}}),
    "lazy": ("galore_lazy_adamw", {}),
    "proximal": ("galore_sgd", {"eta": 10.0}),
    "full": ("adafactor", {}),
    "share": ("sara_adamw", {"rank": 0.2}),
    "pattern": ("fira_adamw", {"rank": 0.2, "rank_pattern": {r"1\.1": 3}}),
}
NO_COLLECTIVE = METHODS.keys() - {"fira", "sketch", "adafactor", "lazy", "full", "pattern"}


def one_process(
    recipe: str,
    settings: dict[str, Any],
    backward: dict[str, Any] | None = None,
    norms: list[float] | None = None,
) -> Any:
    model = build()
    if backward is not None:
        residual = residual_of(recipe, settings.get("residual"))
        subspan.project_backward(model, **{"rank": RANK, "residual": residual, **backward})
    right: dict[str, Any] = {} if recipe in ("adafactor",) or backward is not None else {"proj_type": "right"}
    given = {"lr": 1e-2, "rank": RANK, "update_proj_gap": 7, **right, "min_8bit_size": SMALLEST, **settings}
    optimizer = subspan.create(recipe, model, **given)
    losses = []
    for x, y in batches():
        loss = loss_of(model, x, y)
        loss.backward()
        if norms is not None:
            norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())  # type: ignore[misc]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    states = {
        f"{name}.{key}": value
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
        for key, value in optimizer.state[p].items()
        if isinstance(value, Tensor)
    }
    return dict(model.state_dict()), states, losses


def run(
    tmp_path: Path,
    mesh: list[int],
    names: dict[str, Any],
    backward: dict[str, Any] | None = None,
    in_backward: dict[str, Any] | None = None,
    torchrun: bool = False,
) -> dict[str, Any]:
    out = tmp_path / "run"
    asked = {"names": names, "mesh": mesh, "backward": backward, "in_backward": in_backward, "out": str(out)}
    world = mesh[0] * (mesh[1] if len(mesh) > 1 else 1)
    launch(fsdp_worker.main, world, json.dumps(asked), torchrun=torchrun)
    return {
        name: [
            (torch.load(f"{out}.{name}.{rank}.pt"), json.loads(Path(f"{out}.{name}.{rank}.json").read_text()))
            for rank in range(world)
        ]
        for name in names
    }


def check_equal(name: str, ranks: Any, weights: dict[str, Tensor], states: dict[str, Tensor]) -> None:
    for tensors, _ in ranks:
        assert tensors["weights"].keys() == weights.keys()
        assert tensors["states"].keys() == states.keys()
        for ours, theirs in ((tensors["weights"], weights), (tensors["states"], states)):
            for key, value in theirs.items():
                assert ours[key].shape == value.shape, key
                torch.testing.assert_close(
                    ours[key], value, rtol=1e-6, atol=1e-6, msg=lambda text, key=key: f"{name} {key}: {text}"
                )
    first = ranks[0][0]["weights"]
    assert all(torch.equal(first[key], tensors["weights"][key]) for tensors, _ in ranks for key in first)


@pytest.mark.parametrize("mesh", [[2], [3], [2, 2]], ids=str)
def test_equals_one_process(tmp_path: Path, mesh: list[int]) -> None:
    """Thirty steps across refreshes: the weights and every state, also of shards that are uneven or empty, and of
    replicas.
    """
    names = METHODS if mesh == [2] else {name: METHODS[name] for name in ("sara", "fira", "adafactor", "8bit", "share")}
    for name, ranks in run(tmp_path, mesh, names, torchrun=mesh == [2]).items():
        weights, states, _ = one_process(*METHODS[name])
        check_equal(name, ranks, weights, states)
        for (steps, _), refreshed in (
            (pair, flag) for pair, flag in zip(ranks[0][1]["sent"], ranks[0][1]["refreshes"], strict=True)
        ):
            if name in NO_COLLECTIVE and not refreshed:
                assert steps == {}, (name, steps)
            assert not any("gather" in op or "scatter" in op for op in steps), (name, steps)
        assert any(ranks[0][1]["refreshes"]) == (name != "full")


BACKWARD: dict[str, tuple[str, dict[str, Any]]] = {
    "sara": ("sara_adamw", {"stagger": False, "transfer": "rotate"}),
    "rso": ("rso_adamw", {"eta": 10.0}),
    "8bit": ("golore_adamw_8bit", {"weight_decay": 0.1}),
    "sketch": ("sara_sketch_adamw", {"stagger": False, "residual": {"width": 4}}),
    "sketch without a limiter": ("golore_sketch_adamw", {"residual": {"width": 0.3, "limiter": None}}),
}


def test_backward_side_shares_equal_one_process(tmp_path: Path) -> None:
    """The share is of all inputs, whatever rows a rank has."""
    ranks: dict[str, Any] = {"rank": 0.2, "rank_pattern": {r"1\.1": 3}}
    settings = {"select_from": "mean", "share": "none", **ranks}
    name, chosen = BACKWARD["sara"]
    for label, found in run(tmp_path, [2], {"sara": (name, chosen | ranks)}, settings).items():
        weights, states, _ = one_process(name, chosen | ranks, backward=settings)
        check_equal(label, found, weights, states)
        assert {key: value.shape[1] for key, value in states.items() if key.endswith("basis")} == {
            "0.0.carrier.basis": 5,
            "1.1.carrier.basis": 3,
            "2.1.carrier.basis": 6,
        }


@pytest.mark.parametrize("mesh", [[2], [3], [2, 2]], ids=str)
def test_backward_side_equals_one_process(tmp_path: Path, mesh: list[int]) -> None:
    """Weight and carrier sharded, the basis on every rank; an ordinary step sends nothing beyond
    what fully_shard does, except the norm for a limiter.
    """
    settings = {"select_from": "mean", "share": "none"}
    names = BACKWARD if mesh == [2] else {"sara": BACKWARD["sara"]}
    for name, ranks in run(tmp_path, mesh, names, settings).items():
        weights, states, _ = one_process(*BACKWARD[name], backward=settings)
        check_equal(name, ranks, weights, states)
        report = ranks[0][1]
        limited = name == "sketch"  # whose limiter needs the norm of all rows
        assert all(step.keys() <= {"c10d_functional.all_reduce", "c10d.allreduce_"} for step, _ in report["sent"])
        assert all((step != {}) == limited for step, _ in report["sent"])
        sharding = {op for _, passed in report["sent"] for op in passed} - {"c10d.allreduce_", "c10d.broadcast_"}
        assert all("scatter" in op or "gather" in op for op in sharding), sharding


def test_step_in_backward_equals_one_process(tmp_path: Path) -> None:
    """Two micro-batches, at times one, each gradient stepped on and freed in the backward pass: the weights of stepping
    afterwards, and the norm of the whole gradient.
    """
    names = {name: METHODS[name] for name in ("sara", "golore", "fira", "sketch", "full")}
    for name, ranks in run(tmp_path, [2], names, in_backward={"accumulate": 2}).items():
        weights, states, _ = one_process(*METHODS[name])
        check_equal(name, ranks, weights, states)
        norms = [report["norms"] for _, report in ranks]
        assert norms[0] == norms[1]
        if name == "full":
            expected: list[float] = []
            one_process(*METHODS[name], norms=expected)
            assert norms[0] == pytest.approx(expected, rel=1e-4)
