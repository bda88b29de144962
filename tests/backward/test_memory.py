"""What is saved for the backward pass, what gradients are formed, and what the bench reports."""

from typing import Any

import pytest
import torch
from support.backward_side import RANK, backward_side, batches, layers_of, train
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from subspan.bench import memory
from subspan.bench.setting import Setting
from subspan.costs.live_bytes import LiveBytes
from subspan.costs.saved_activations import SavedBytes
from subspan.utils.ranks import rank_of_side

TOKENS = 48  # of a batch


def saved_by_layers(model: Any, batch: Any) -> list[tuple[int, ...]]:
    """Shapes of what the backward-side layers save, weights apart, a storage once."""
    inside, seen = [0], {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if inside[0] and tensor.untyped_storage().data_ptr() not in weights:
            seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hooks = []
    for layer in layers_of(model).values():
        hooks.append(layer.register_forward_pre_hook(lambda *_: inside.__setitem__(0, 1)))
        hooks.append(layer.register_forward_hook(lambda *_: inside.__setitem__(0, 0)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    for hook in hooks:
        hook.remove()
    loss.backward()
    return sorted(tuple(tensor.shape) for tensor in seen.values())


@pytest.mark.parametrize("name", ["sara_adamw", "golore_adamw", "gosare_adamw", "flora_adamw"])
def test_no_input_is_saved_between_refreshes(llama: Any, name: str) -> None:
    """A block saves four tensors of r columns (q, k, v; o; gate, up; down) and none of the width of an input: 4r per
    token instead of 3d + f.
    """
    model = llama()
    optimizer, _ = backward_side(model, name)
    train(model, optimizer, batches(1))
    (batch,) = batches(1, seed=1)
    assert saved_by_layers(model, batch) == 2 * 4 * [(4, 12, RANK)]


def test_what_a_refresh_saves(llama: Any) -> None:
    """At a step that chooses bases from gradients the inputs are saved, once for layers that share them; random bases
    never.
    """
    for name, widths in (("sara_adamw", [32, 32, 32, 48]), ("golore_adamw", 4 * [RANK])):
        model = llama()
        _optimizer = backward_side(model, name)[0]  # holds the bases
        (batch,) = batches(1)
        assert saved_by_layers(model, batch) == sorted(2 * [(4, 12, width) for width in widths])


class Largest(TorchDispatchMode):
    """Counts tensors of the shape of a projected weight that are made."""

    def __init__(self, shapes: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes, self.made = shapes, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {
            leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in given:
                self.made += tuple(leaf.shape) in self.shapes
        return out


@pytest.mark.parametrize("name", ["sara_adamw", "golore_adamw", "rso_sgd"])
def test_an_ordinary_step_makes_nothing_of_the_size_of_a_weight(llama: Any, name: str) -> None:
    """Neither a gradient nor an update: the weight takes U Qᵀ in place."""
    model = llama(num_key_value_heads=4, intermediate_size=52)
    optimizer, _ = backward_side(model, name)
    train(model, optimizer, batches(1))
    shapes = {tuple(layer.weight.shape) for layer in layers_of(model).values()}
    (batch,) = batches(1, seed=1)
    with Largest(shapes) as made:
        model(**batch).loss.backward()
        optimizer.step()
    assert made.made == 0
    a, b = torch.empty(32, 52), torch.empty(52, 52)
    with Largest(shapes) as control:
        a @ b
    assert control.made == 1


def test_staggered_refreshes_form_few_gradients(llama: Any) -> None:
    """By default the first bases are drawn from noise and each group has its first gradient at a step of its own; over
    a period every one has had it.
    """
    model = llama()
    optimizer, handle = backward_side(model, "sara_adamw", stagger=None, update_proj_gap=20)
    assert optimizer.stagger
    formed = []
    for batch in batches(25):
        plans = []
        loss = model(**batch).loss
        plans = [projection.plan for projection in handle.projections]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        formed.append(sum(plan == "form" for plan in plans))
        assert "draw" not in plans
    assert max(formed) == 1
    assert sum(formed[:20]) == len(handle.projections) == 8


def test_the_bench_agrees_with_closed_forms() -> None:
    """Measured bytes of weights, carriers, gradients, states, bases and inputs of linear layers equal the formulas, row
    by row; and a backward-side step peaks below an optimizer-side one.
    """
    rows = {
        row["name"]: row
        for row in memory.measure(Setting("llama-nano", tokens=512, rank=16, sequence_length=64))["rows"]
    }
    assert list(rows) == [
        "adamw", "galore_adamw", "sara_adamw", "sara_adamw_backward", "rso_adamw", "sara_sketch_adamw_backward"
    ]  # fmt: skip
    for row in rows.values():
        for key, value in row["formula"].items():
            assert row[key] == value, (row["name"], key)
        assert row["refresh_peak_bytes"] >= row["weight_bytes"]
    d, f, layers, tokens, r = 64, 172, 4, 512, 16
    assert rows["adamw"]["linear_activation_bytes"] == 4 * tokens * layers * (3 * d + f)
    assert rows["sara_adamw_backward"]["linear_activation_bytes"] == 4 * tokens * layers * 4 * r
    sketched, plain = rows["sara_sketch_adamw_backward"], rows["sara_adamw_backward"]
    for key in ("linear_activation_bytes", "carrier_bytes"):  # r + s columns, where s = r
        assert sketched[key] == 2 * plain[key]
    assert sketched["state_bytes"] - plain["state_bytes"] == 4 * 7 * layers  # one number for each matrix
    assert sketched["basis_bytes"] == plain["basis_bytes"]
    saved = rows["sara_adamw"]["saved_activation_bytes"] - rows["rso_adamw"]["saved_activation_bytes"]
    assert saved >= 4 * tokens * layers * (2 * d + f - 4 * r)  # o's input is kept by the attention too
    for name in ("sara_adamw_backward", "rso_adamw"):
        assert rows[name]["peak_bytes"] < rows["sara_adamw"]["peak_bytes"] < rows["adamw"]["peak_bytes"]
        assert rows[name]["gradient_bytes"] < rows["sara_adamw"]["gradient_bytes"]


@pytest.mark.parametrize("pattern", [None, {"q_proj": 32, r"layers\.1.*up_proj": 0.5, "o_proj": 0.1}], ids=str)
def test_the_bench_agrees_with_closed_forms_of_shares(pattern: Any) -> None:
    """A quarter of 64 inputs is 16, and of 172 it is 43; layers that a pattern parts keep an x Q each."""
    setting = Setting("llama-nano", tokens=128, rank=0.25, rank_pattern=pattern, sequence_length=64)
    rows = {row["name"]: row for row in memory.measure(setting)["rows"]}
    for row in rows.values():
        for key, value in row["formula"].items():
            assert row[key] == value, (row["name"], key)
    kept = 4 * (16 + 16 + 16 + 43) if pattern is None else 4 * (32 + 16 + 6 + 16 + 43) + 32
    assert rows["sara_adamw_backward"]["linear_activation_bytes"] == 4 * 128 * kept


@pytest.mark.parametrize(("rank", "kept"), [(0.25, 3 * 16 + 16 + 2 * 16 + 43), (0.5, 64 + 32 + 64 + 86)])
def test_the_bench_agrees_with_closed_forms_of_own_bases(rank: float, kept: int) -> None:
    """The layers q, k, v and gate, up keep an x Q each, or their input if it is less. No row keeps more than AdamW."""
    setting = Setting("llama-nano", tokens=128, rank=rank, sequence_length=64, share="none")
    rows = {row["name"]: row for row in memory.measure(setting)["rows"]}
    for row in rows.values():
        for key, value in row["formula"].items():
            assert row[key] == value, (row["name"], key)
        for key in ("saved_activation_bytes", "linear_activation_bytes"):
            assert row[key] <= rows["adamw"][key]
    for name in ("sara_adamw_backward", "rso_adamw"):
        assert rows[name]["linear_activation_bytes"] == 4 * 128 * 4 * kept
    sketched = sum(min(n, 2 * count * rank_of_side(rank, n)) for n, count in ((64, 3), (64, 1), (64, 2), (172, 1)))
    assert rows["sara_sketch_adamw_backward"]["linear_activation_bytes"] == 4 * 128 * 4 * sketched


def test_the_tracker_counts_what_lives() -> None:
    """Three live tensors of 4,000 bytes and a fourth that is freed; a view is no storage of its own."""
    held = torch.zeros(1000)
    with LiveBytes([held]) as live:
        a = torch.ones(1000)
        b = a + held
        del b
        c = a.view(10, 100) * 2
        assert live.peak == 4000 * 3
        del a
        d = c + 1
    assert live.peak == 4000 * 3
    del c, d


def test_saved_bytes_count_a_storage_once() -> None:
    first, second = torch.nn.Linear(10, 20), torch.nn.Linear(10, 20)
    model = torch.nn.ModuleList([first, second])
    x = torch.randn(7, 10, requires_grad=True)
    with SavedBytes(model, [first, second]) as saved:
        y = first(x) + second(x)
        torch.exp(y)
    assert saved.by_layers == 4 * 70
    assert saved.total == 4 * (70 + 140)
