"""Backward-side layers whose optimizer has a sketched residual: ``[R T]``, and the weights of the other execution."""

import copy
import pickle
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from support.backward_side import RANK, batches, layers_of
from support.pairs import every_pair
from torch import Tensor, nn

import subspan
from subspan.residuals import Discard, Fira, Sketch

WIDE = Sketch(6)


def network(seed: int = 0) -> nn.Sequential:
    """Linear layers whose inputs are of three lengths, with biases and a norm that have gradients of their own."""
    torch.manual_seed(seed)
    layers = [nn.Linear(12, 20), nn.LayerNorm(20), nn.Tanh(), nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 9)]
    return nn.Sequential(*layers).double()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Any = range(8), parts: int = 1) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = (torch.randn(24, n, generator=generator, dtype=torch.float64) for n in (12, 9))
        for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
            ((model(a) - b).square().mean() / parts).backward()
        optimizer.step()
        optimizer.zero_grad()


def build(
    model: nn.Module, backward: bool, residual: Any = WIDE, name: str = "sara_sketch_adamw", **settings: Any
) -> Any:
    chosen = {"lr": 1e-2, "rank": 5, "update_proj_gap": 3, "stagger": False, "seed": 4, "weight_decay": 0.1, **settings}
    if backward:
        subspan.project_backward(model, rank=5, share="none", residual=residual, merge=chosen.pop("merge", "step"))
    chosen.pop("merge", None)
    return subspan.create(name, model, proj_type="right", residual=residual, **chosen)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor], atol: float = 1e-10) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@every_pair(
    "name, residual, merge",
    [
        *product(
            ["sara_sketch_adamw", "golore_sketch_adamw", "galore_sgd", "gosare_adamw", "galore_adafactor"],
            [Sketch(), WIDE, Sketch(0.3, None, limiter=None), Sketch(6, weight="root", draw="coordinates"),
             Sketch(6, draw="cosines"), Sketch(100)],
            ["step", "refresh"],
        )
    ],
)  # fmt: skip
def test_both_executions_give_the_same_weights(name: str, residual: Sketch, merge: str) -> None:
    """After 8 steps over three bases, in fp64: the same keys draw the same bases and sketches."""
    twin, model = network(), network()
    start = weights(model)
    settings = {"name": name, "residual": residual, "lr": 1e-2 if "sgd" not in name else 0.1}
    optimizer, other = build(twin, False, **settings), build(model, True, merge=merge, **settings)
    train(twin, optimizer)
    train(model, other)
    close(weights(model), weights(twin))
    discarded = network()
    train(discarded, build(discarded, True, **{**settings, "residual": Discard()}))
    assert any((weights(discarded)[key] - value).abs().max() > 1e-4 for key, value in weights(model).items())
    assert any((start[key] - value).abs().max() > 1e-3 for key, value in weights(model).items())


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("share", ["auto", "none"])
@pytest.mark.parametrize(("parts", "draw"), [(1, "gaussian"), (3, "gaussian"), (3, "coordinates")])
def test_carriers_get_the_sketched_gradient(llama: Any, share: str, checkpointed: bool, parts: int, draw: str) -> None:
    """Every carrier gets ``G [Q O]``, at a step that chooses the basis and at those that do not. Layers that share a
    basis share the sketch, all micro-batches of a step have one, and another step has another.
    """
    model = llama().double()
    if checkpointed:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    plain = copy.deepcopy(model)
    residual = replace(WIDE, draw=draw)
    subspan.project_backward(model, rank=RANK, share=share, residual=residual)
    optimizer = subspan.create("sara_sketch_adamw", model, lr=0.0, stagger=False, residual=residual, update_proj_gap=2)
    drawn = []
    for step in range(3):
        for batch in batches(parts, seed=step):
            plain(**batch).loss.backward()
            model(**batch).loss.backward()
        for path, layer in layers_of(model).items():
            frame = layer.projection.frame()
            Q, O = frame.project(torch.eye(layer.in_features, dtype=torch.float64)).split([RANK, 6], -1)
            torch.testing.assert_close(Q.T @ Q, torch.eye(RANK, dtype=torch.float64), rtol=0, atol=1e-10)
            assert (Q.T @ O).abs().max() < 1e-10
            G = plain.get_parameter(f"{path}.weight").grad
            assert G is not None
            torch.testing.assert_close(layer.carrier.grad, torch.cat([G @ Q, G @ O], -1), rtol=0, atol=1e-12)
        drawn.append(O)
        optimizer.step()
        optimizer.zero_grad()
        plain.zero_grad()
    assert not torch.allclose(drawn[1], drawn[2])
    attention = model.model.layers[0].self_attn
    assert (attention.q_proj.projection is attention.k_proj.projection) == (share == "auto")


def test_nothing_else_is_kept() -> None:
    """A pass keeps ``h`` of width r + s and no input; the state has one number more than without the sketch."""
    model, plain = network(), network()
    optimizer, other = build(model, True), build(plain, True, Discard(), "sara_adamw")
    for state, without in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert state.keys() - without.keys() <= {"residual_norm"}
        assert {k: v.shape for k, v in state.items() if hasattr(v, "shape") and v.ndim} == {
            k: v.shape for k, v in without.items() if hasattr(v, "shape") and v.ndim
        }
    train(model, optimizer, [0])
    saved: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    x = torch.randn(24, 12, dtype=torch.float64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model[0](x)
    assert (24, 5 + 6) in saved
    assert (24, 12) not in saved


@pytest.mark.parametrize("merge", ["step", "refresh"])
def test_accumulation_and_steps_in_the_backward_pass(merge: str) -> None:
    """Three micro-batches are one batch, and stepping in the backward pass is stepping after it.

    The bases are random ones: others are chosen from the first micro-batch.
    """
    found = []
    for parts, in_backward in ((1, False), (3, False), (3, True)):
        model = network()
        optimizer = build(model, True, name="golore_sketch_adamw", merge=merge)
        if in_backward:
            optimizer.enable_step_in_backward(model, accumulate=parts)
        train(model, optimizer, parts=parts)
        found.append(weights(model))
    close(found[1], found[0])
    close(found[2], found[1])


@pytest.mark.parametrize("parts", [1, 3])
def test_steps_in_the_backward_pass_of_ordinary_weights(parts: int) -> None:
    """Micro-batches add up ``[R T]``, or the gradient where a basis is due; the weights are those of stepping after."""
    found = []
    for in_backward in (False, True):
        model = network()
        optimizer = build(model, False)
        if in_backward:
            optimizer.enable_step_in_backward(model, accumulate=parts)
        train(model, optimizer, parts=parts)
        found.append(weights(model))
    close(found[1], found[0])


@pytest.mark.parametrize("name", ["sara_sketch_adamw", "golore_sketch_adamw_8bit"])
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("merge", ["step", "refresh"])
def test_resumed_bit_for_bit(name: str, rounded: bool, merge: str) -> None:
    """A run that is saved after five steps and resumed has the bits of one that was not, also in bf16."""

    def start() -> tuple[nn.Module, Any]:
        model = network().bfloat16().to(torch.bfloat16 if rounded else torch.float32)
        return model, build(model, True, name=name, merge=merge, bf16_stochastic_round=rounded, min_8bit_size=64)

    def go(model: nn.Module, optimizer: Any, steps: Any) -> None:
        for step in steps:
            x = torch.randn(24, 12, generator=torch.Generator().manual_seed(step)).to(model[0].weight.dtype)
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = start()
    go(model, optimizer, range(5))
    saved = pickle.loads(pickle.dumps((model.state_dict(), optimizer.state_dict())))
    if merge == "refresh":  # what is saved is merged, so only a run at a refresh can go on with the same bits
        go(model, optimizer, [5])
        saved = pickle.loads(pickle.dumps((model.state_dict(), optimizer.state_dict())))
    other, resumed = start()
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    steps = range(5, 9) if merge == "step" else range(6, 9)
    go(model, optimizer, steps)
    go(other, resumed, steps)
    for key, value in model.state_dict().items():
        assert value.isfinite().all()
        if merge == "step" or not rounded:
            assert torch.equal(other.state_dict()[key], value), key


def test_bf16_rounds_the_whole_step_on_average() -> None:
    """With stochastic rounding the mean over seeds of the weight is that of fp32, inside the subspace and outside."""
    moved = []
    for seed in range(200):
        model = nn.Sequential(nn.Linear(12, 8, bias=False))
        nn.init.constant_(model[0].weight, 1.0)
        model = model.bfloat16() if seed else model
        subspan.project_backward(model, rank=3, share="none", residual=WIDE)
        optimizer = subspan.create(
            "golore_sketch_adamw", model, lr=1e-3, residual=WIDE, bf16_stochastic_round=True, seed=0
        )
        if seed:  # the rounding draws from the key, so another key needs another name of the parameter
            optimizer.param_groups[0]["param_names"] = [f"{seed}.carrier"]
        x = torch.linspace(-1, 1, 60).reshape(5, 12).to(model[0].weight.dtype)
        model(x).square().mean().backward()
        optimizer.step()
        moved.append(model[0].weight.detach().float() - 1)
    exact, mean = moved[0], torch.stack(moved[1:]).mean(0)
    assert exact.abs().max() < 2**-8  # to nearest, nothing would move
    # One rounding has a deviation of at most half of the step between two numbers, which is 2^-7 above 1.
    assert (mean - exact).abs().max() < 5 * 2**-8 / 199**0.5 + 0.05 * exact.abs().max()
    assert exact.abs().max() > 1e-3


@pytest.mark.parametrize("draw", ["gaussian", "coordinates"])
def test_autocast(draw: str) -> None:
    """Activations in bf16 keep an ``h`` in bf16; the carriers' gradients are near those of fp32."""
    found = []
    for enabled in (False, True):
        model = network().float()
        optimizer = build(model, True, Sketch(6, draw=draw))
        x = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(x).square().mean()
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        optimizer.step()
        assert all(p.isfinite().all() for p in model.parameters())
    assert found[1].dtype == torch.float32
    assert (found[0] - found[1]).norm() < 0.03 * found[0].norm()


def test_copies_go_on() -> None:
    """A copy of the pair draws the same sketches as the original."""
    model = network()
    optimizer = build(model, True)
    train(model, optimizer, range(4))
    other, copied = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(4, 8))
    train(other, copied, range(4, 8))
    assert all(torch.equal(weights(other)[key], value) for key, value in weights(model).items())


def test_clipping_sees_the_norm_of_the_gradient_on_average() -> None:
    """The mean over steps of the squared norm of ``[R T]`` is that of ``G``, whose variance bounds the error."""
    model = nn.Sequential(nn.Linear(20, 30, bias=False)).double()
    x = torch.randn(50, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = copy.deepcopy(model)
    plain(x).square().mean().backward()
    G = plain[0].weight.grad
    assert G is not None
    subspan.project_backward(model, rank=4, residual=WIDE)
    optimizer = subspan.create("golore_sketch_adamw", model, lr=0.0, residual=WIDE, update_proj_gap=10**6)
    squares = []
    for _ in range(300):
        model(x).square().mean().backward()
        squares.append(model[0].carrier.grad.square().sum())
        optimizer.step()
        optimizer.zero_grad()
    found = torch.stack(squares)
    assert abs(found.mean() - G.square().sum()) < 4 * found.std() / 300**0.5


@pytest.mark.parametrize(
    ("made", "given", "words"),
    [
        (
            None,
            Sketch(6),
            r"residual=Sketch\(width=6.*sketch of 6 directions of the inputs of 0.weight.*one of 0; give",
        ),
        (Sketch(6), Discard(), r"residual=Discard\(\): has a sketch of 0 directions.*one of 6"),
        (Sketch(6), Sketch(4), r"sketch of 4 directions.*one of 6; give the optimizer's residual to project_backward"),
    ],
)
def test_a_residual_that_the_layers_were_not_made_for(made: Any, given: Any, words: str) -> None:
    model = network()
    subspan.project_backward(model, rank=5, share="none", residual=made)
    with pytest.raises(ValueError, match=words):
        subspan.create("sara_adamw", model, residual=given)


def test_residuals_that_layers_cannot_be_made_for() -> None:
    with pytest.raises(ValueError, match=r"residual=Fira.*needs every gradient.*residuals.Sketch\(\), or none"):
        subspan.project_backward(network(), rank=5, residual=Fira())
    with pytest.raises(ValueError, match=r"residual=16: expected a residual, such as subspan.residuals.Sketch\(\)"):
        subspan.project_backward(network(), rank=5, residual=16)  # type: ignore[arg-type]
    handle = subspan.project_backward(network(), rank=5, share="none", residual=WIDE)
    with pytest.raises(ValueError, match=r"enter\(\): these layers were made with a residual that has a sketch"):
        handle.enter(subspan.selectors.Random())


def test_what_the_summary_says(caplog: pytest.LogCaptureFixture) -> None:
    """The widths stand beside the ranks; a sketch of all that is outside is said once."""
    model = network()
    with caplog.at_level("WARNING"):
        text = build(model, True, Sketch(8)).summary()
    assert "5 + 7" in text
    assert "5 + 8" in text
    said = [record.message for record in caplog.records if "is all that is outside" in record.message]
    assert len(said) == 1
    assert "1 of the matrices, such as '0.weight', where there are only 7 directions" in said[0]
    assert "5 + 8" in build(network(), False, Sketch(8)).summary()
    assert "sketch=7" in repr(model[0])
