"""What layers with bases of their own keep of an input that several of them meet."""

import copy
import pickle
from itertools import product
from typing import Any

import pytest
import torch
from support.backward_side import basis_of, batches, layers_of
from support.pairs import every_pair
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import subspan
from subspan.backward.inputs import Inputs
from subspan.costs.live_bytes import LiveBytes
from subspan.costs.saved_activations import SavedBytes
from subspan.residuals import Discard, Sketch

N, TOKENS = 32, 48  # width of the model, tokens of a batch


class Two(nn.Module):
    """A model that says nothing of its inputs: two layers meet one of them, and a third makes the output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(N)
        self.a, self.b, self.c = nn.Linear(N, 20), nn.Linear(N, 20), nn.Linear(20, 4)

    def body(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.c(torch.sin(self.a(x) + self.b(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Checkpointed(Two):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False)


class Reused(Two):
    """A layer gets one input twice, and another one too."""

    def body(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.c(torch.sin(self.a(x) + self.b(x) + self.a(x * 2) + self.a(x)))


def build(model: nn.Module, rank: Any = 16, name: str = "golore_adamw", **given: Any) -> Any:
    """Give ``model`` backward-side layers with bases of their own, or what ``share`` says, and an optimizer."""
    made = given.pop("residual", Discard())
    layers = {key: given.pop(key) for key in ("share", "merge", "targets", "rank_pattern") if key in given}
    handle = subspan.project_backward(model, rank=rank, residual=made, **{"share": "none", **layers})
    settings = {"lr": 1e-2, "update_proj_gap": 3, "stagger": False, "seed": 4, "weight_decay": 0.1, **given}
    return subspan.create(name, model, residual=made, **settings), handle


def step(model: nn.Module, optimizer: Any, number: int, parts: int = 1) -> None:
    x = torch.randn(TOKENS, N, generator=torch.Generator().manual_seed(number)).to(next(model.parameters()).dtype)
    for part in x.chunk(parts):
        (model(part).square().mean() / parts).backward()
    optimizer.step()
    optimizer.zero_grad()


def kept(model: Any, x: Tensor, mixed: bool = False) -> int:
    """Numbers for each token that the layers save, a storage once."""
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed), SavedBytes(model, layers_of(model).values()) as saved:
        model(x)
    return saved.by_layers // (len(x) * (2 if mixed else x.element_size()))


def same(one: nn.Module, other: nn.Module) -> None:
    for (name, p), q in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(p, q), name


@pytest.fixture
def always_h(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets every basis keep its own ``h``, as all did before: what the weights are compared with."""

    def call(do: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(Inputs, "keeps", lambda self, number: False)
            return do()

    return call


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(("rank", "width"), [(4, 2 * 4), (15, 2 * 15), (16, N), (20, N), (32, N)])
def test_two_layers_that_meet_one_input(rank: int, width: int, mixed: bool) -> None:
    """From the second step on they keep the smaller of their two h and x, and under autocast one cast of x. In the
    first step nothing is known of the model, and they keep what ordinary layers keep, of which each makes a cast.
    """
    model, x = Two(), torch.randn(TOKENS, N)
    optimizer, _ = build(model, rank, targets=["a", "b"])
    assert kept(model, x, mixed) == (2 * N if mixed else N)
    step(model, optimizer, 0)
    assert kept(model, x, mixed) == width
    step(model, optimizer, 1)
    assert kept(model, x, mixed) == width


def test_an_input_that_is_kept_for_a_refresh_is_kept_by_all() -> None:
    """Where one of two bases is chosen from a gradient, the other needs no h beside x."""
    model, x = Two(), torch.randn(TOKENS, N)
    optimizer, handle = build(model, 4, "sara_adamw", targets=["a", "b"], update_proj_gap=100)
    step(model, optimizer, 0)
    assert kept(model, x) == 8
    handle.projections[1].expect("form")
    assert kept(model, x) == N
    step(model, optimizer, 1)
    assert kept(model, x) == 8


@pytest.mark.parametrize(
    ("a", "b", "c", "width"),
    [
        (2, 15, 15, 2 + 15 + 15 + 15),  # both inputs, of width 32, are wider than their h
        (30, 4, 4, 2 * N),  # the first is not, so b keeps x; then it keeps y too, and c needs no h
        (4, 4, 30, 2 * N),
    ],
)
def test_layers_that_meet_in_turn(a: int, b: int, c: int, width: int) -> None:
    """``b`` meets ``a`` at one input and ``c`` at another. If one of the two is kept, so is the other."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(N, N) for _ in range(3))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.a(x) + self.b(x) + self.b(y) + self.c(y)

    model, x, y = Chain(), torch.randn(5, N), torch.randn(5, N)
    optimizer, handle = build(model, b, rank_pattern={"a": a, "c": c})
    for _ in range(2):
        with SavedBytes(model, handle.layers) as saved:
            loss = model(x, y).square().sum()
        loss.backward()
        optimizer.step()
    assert saved.by_layers // (5 * 4) == width


MODELS = {"shared": "auto", "own": "none", "listed": [["q_proj", "k_proj", "v_proj"]]}


@every_pair(
    "share, rank, mixed, checkpointed, sketched",
    [*product(MODELS, [2, 0.25, 0.5, 0.75], [False, True], [False, True], [False, True])],
)
def test_never_more_than_ordinary_training(
    llama: Any, share: str, rank: Any, mixed: bool, checkpointed: bool, sketched: bool
) -> None:
    """What autograd saves in each of three steps is no more than for the same model with ordinary layers."""

    def saved(model: Any, layers: Any) -> int:
        (batch,) = batches(1, seed=1)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed), SavedBytes(model, layers) as counted:
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        return counted.total

    model = llama(attn_implementation="eager").train()
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    most = saved(copy.deepcopy(model), [])
    given = {"name": "sara_sketch_adamw", "residual": Sketch(0.25)} if sketched else {"name": "sara_adamw"}
    optimizer, _ = build(model, rank, share=MODELS[share], stagger=True, **given)
    found = []
    for _ in range(3):
        found.append(saved(model, []))
        optimizer.step()
        optimizer.zero_grad()
    assert max(found) <= most
    # A basis of three quarters and a sketch of one are all directions, so nothing is less, except that casts
    # are one.
    if not checkpointed and (rank != 0.75 or not sketched or mixed):
        assert found[-1] < most


# --- what is computed -------------------------------------------------------------------------------------------------


@every_pair(
    "kind, name, residual, merge, parts, dtype",
    [
        *product(
            [Two, Checkpointed, Reused],
            ["golore_adamw", "sara_adamw", "gosare_adamw", "galore_sgd", "sara_adamw_8bit"],
            [None, Sketch(4), Sketch(0.25, draw="coordinates")],
            ["step", "refresh"],
            [1, 3],
            [torch.float64, torch.float32, torch.bfloat16],
        )
    ],
)
def test_the_bits_are_those_of_keeping_h(
    always_h: Any, kind: Any, name: str, residual: Any, merge: str, parts: int, dtype: torch.dtype
) -> None:
    """Seven steps over three bases of each layer give the weights, the moments and the bases of layers that keep an h
    of their own, in every bit.
    """
    given = {"rank": 16, "name": name, "merge": merge, "targets": ["a", "b"], "min_8bit_size": 64}
    if residual is not None:
        given["residual"] = residual

    def trained() -> tuple[nn.Module, Any, int]:
        model = kind().to(dtype)
        optimizer, _ = build(model, **given)
        for number in range(7):
            step(model, optimizer, number, parts)
        return model, optimizer, kept(model, torch.randn(TOKENS, N, dtype=dtype))

    model, optimizer, width = trained()
    other, reference, wider = always_h(trained)
    if kind is Two:
        assert (width, wider) == (N, 2 * (16 if residual is None else 16 + residual.sketch_width(N, 16)))
    same(model, other)
    for state, expected in zip(optimizer.state.values(), reference.state.values(), strict=True):
        for key, value in expected.items():
            assert torch.equal(state[key], value) if isinstance(value, Tensor) else state[key] == value, key


def test_the_bits_under_autocast(always_h: Any) -> None:
    """One cast of an input is as good as two: gradients of the input are still added up as they were."""

    def trained() -> nn.Module:
        model = Two()
        optimizer, _ = build(model, targets=["a", "b"])
        for number in range(4):
            with torch.autocast("cpu", torch.bfloat16):
                step(model, optimizer, number)
        return model

    same(trained(), always_h(trained))


@pytest.mark.parametrize("kind", [Two, Checkpointed, Reused])
@pytest.mark.parametrize("parts", [1, 3])
def test_steps_in_the_backward_pass(kind: Any, parts: int) -> None:
    """An x Q that is made in the backward pass is in the basis, and with the sketch, of the forward pass."""
    found = []
    for in_backward in (False, True):
        model = kind().double()
        optimizer, _ = build(model, name="golore_sketch_adamw", residual=Sketch(4), targets=["a", "b"])
        if in_backward:
            optimizer.enable_step_in_backward(model, accumulate=parts)
        for number in range(7):
            step(model, optimizer, number, parts)
        found.append(model)
    same(*found)


@pytest.mark.parametrize("name", ["golore_adamw", "sara_adamw"])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_gradient_of_every_carrier(name: str, parts: int) -> None:
    """It is ``G Q`` of plain autograd, in fp64, from layers that keep x; also of a layer that gets it twice."""
    model = Reused().double()
    plain = copy.deepcopy(model)
    optimizer, _ = build(model, 16, name, targets=["a", "b"], lr=0.0, update_proj_gap=2)
    for number in range(4):
        x = torch.randn(TOKENS, N, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        for part in x.chunk(parts):
            for network in (model, plain):
                network(part).square().mean().backward()
        for path, layer in layers_of(model).items():
            expected = plain.get_parameter(f"{path}.weight").grad @ basis_of(layer)
            torch.testing.assert_close(layer.carrier.grad, expected, rtol=0, atol=1e-12)
        optimizer.step()
        optimizer.zero_grad()
        plain.zero_grad()


def test_no_gradient_of_the_size_of_a_weight_is_formed() -> None:
    """Nor is one where the input is kept."""
    model = Two()
    optimizer, _ = build(model, targets=["a", "b"], update_proj_gap=100)
    step(model, optimizer, 0)
    x = torch.randn(TOKENS, N)
    assert kept(model, x) == N
    with Shapes() as made:
        model(x).square().mean().backward()
    assert (20, 16) in made.shapes
    assert (20, N) not in made.shapes


class Shapes(TorchDispatchMode):
    """Collects the shapes of what operations return, apart from views."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out._base is None and not func.is_view:
            self.shapes.add(tuple(out.shape))
        return out


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["golore_adamw", "sara_sketch_adamw"])
@pytest.mark.parametrize("rank", [4, 16])
def test_resumed_bit_for_bit(name: str, rank: int) -> None:
    """A resumed run does not know yet what its layers meet, and has the same bits."""
    given = {"rank": rank, "name": name, "targets": ["a", "b"]}
    if "sketch" in name:
        given["residual"] = Sketch(4)
    model = Two()
    optimizer, _ = build(model, **given)
    for number in range(4):
        step(model, optimizer, number)
    saved = pickle.loads(pickle.dumps((model.state_dict(), optimizer.state_dict())))
    other = Two()
    resumed, _ = build(other, **given)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for number in range(4, 9):
        step(model, optimizer, number)
        step(other, resumed, number)
    same(other, model)


def test_a_copy_knows_what_the_original_knew() -> None:
    """And a copy of one block copies no other."""
    model = nn.Sequential(Two(), nn.Linear(4, N), Two())
    optimizer, _ = build(model, targets=["a", "b"])
    step(model, optimizer, 0)
    twin, other = copy.deepcopy((model, optimizer))
    x = torch.randn(TOKENS, N)
    assert kept(twin, x) == kept(model, x) == 2 * N
    step(twin, other, 1)
    step(model, optimizer, 1)
    same(twin, model)
    size = len(pickle.dumps(copy.deepcopy(model[0]).state_dict()))
    assert len(pickle.dumps(copy.deepcopy(model[0]))) < 2 * size + 20_000


def test_inputs_are_not_kept_alive() -> None:
    """A layer that does not run leaves one cast behind, which goes with its next input, or with the step."""
    model = Two()
    optimizer, handle = build(model, targets=["a", "b"])
    with torch.autocast("cpu", torch.bfloat16):
        step(model, optimizer, 0)
    cast = TOKENS * N * 2
    states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    with LiveBytes([*model.parameters(), *states]) as live, torch.autocast("cpu", torch.bfloat16):
        x, y = torch.randn(TOKENS, N), torch.randn(TOKENS, N)
        there = live.now
        model.a(x)
        assert live.now - there == cast  # b may still come
        model.a(x * 1)
        assert live.now - there == cast
        model.a(y), model.b(y)
        assert live.now - there == 0
        model.a(x)
        for projection in handle.projections:
            projection.expect("keep")
        assert live.now - there == 0
