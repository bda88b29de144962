"""Stepping in the backward pass: the same weights as after it, one gradient at a time, and refusals."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import subspan
from subspan.step.in_backward import _StandIn

STEPS = 9
RECIPES = [
    "sara_adamw",
    "golore_sgd",
    "fira_adamw",
    "sara_sketch_adamw",
    "ldadam_adamw",
    "galore_adafactor",
    "online_pca_adamw",
    "adam_mini",
]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 24), nn.Tanh(), nn.Linear(24, 10)).double()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(32, n, generator=generator, dtype=torch.float64) for n in (20, 10))  # type: ignore[return-value]


def build(recipe: str, model: nn.Module, **settings: Any) -> Any:
    ranked = {} if recipe == "adam_mini" else {"rank": 6, "update_proj_gap": 4}
    return subspan.create(recipe, model, **{"lr": 1e-2, "total_steps": STEPS, **ranked, **settings})


def train(model: nn.Module, optimizer: Any, parts: int = 1, steps: Any = range(STEPS)) -> None:
    for step in steps:
        x, y = batch(step)
        for part in zip(x.chunk(parts), y.chunk(parts), strict=True):
            ((model(part[0]) - part[1]).square().mean() / parts).backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("recipe", RECIPES)
def test_same_weights(recipe: str) -> None:
    """Bit for bit those of stepping afterwards, over refreshes, with a scheduler and a state that
    is saved and loaded.
    """
    runs = []
    for in_backward in (False, True):
        model = network()
        optimizer = build(recipe, model)
        if in_backward:
            optimizer.enable_step_in_backward(model)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
        for step in range(STEPS):
            train(model, optimizer, steps=[step])
            schedule.step()
            if step == 5:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        runs.append(weights(model))
    assert torch.equal(*runs)


@pytest.mark.parametrize("recipe", [*RECIPES, "backward-side"])
def test_accumulation(recipe: str) -> None:
    """Four micro-batches are the whole batch."""
    runs = []
    for parts in (1, 4):
        model = network()
        if recipe == "backward-side":
            subspan.project_backward(model, rank=6, share="none")
        optimizer = build("golore_adamw" if recipe == "backward-side" else recipe, model)
        optimizer.enable_step_in_backward(model, accumulate=parts)
        train(model, optimizer, parts)
        runs.append(weights(model))
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_one_gradient_at_a_time(accumulate: int) -> None:
    """In an ordinary step no other projected weight's gradient is there while one is made."""
    model = network()
    optimizer = build("sara_adamw", model, update_proj_gap=1000)
    optimizer.enable_step_in_backward(model, accumulate)
    train(model, optimizer, accumulate, range(1))
    held = []
    matrices = [p for p in model.parameters() if p.ndim > 1]
    for p in matrices:
        p.register_hook(
            lambda _: held.append(sum(q.grad is not None and type(q.grad) is not _StandIn for q in matrices))
        )
    train(model, optimizer, accumulate, range(1, 3))
    assert held == [0] * len(held)
    assert len(held) == 2 * accumulate * len(matrices)


@pytest.mark.parametrize("clip", ["per_param", "lagged_global"])
def test_clipping(clip: Any) -> None:
    """Each gradient by its own norm, or all by the global norm of the step before."""
    runs, last = [], 0.0
    for in_backward in (True, False):
        model = network()
        optimizer = build("adam_mini", model)
        if in_backward:
            optimizer.enable_step_in_backward(model, clip=clip, max_norm=0.05)
            train(model, optimizer)
        else:
            for step in range(STEPS):
                x, y = batch(step)
                (model(x) - y).square().mean().backward()
                norms = torch.stack([p.grad.norm() for p in model.parameters()])
                for p, norm in zip(model.parameters(), norms, strict=True):
                    p.grad *= min(1.0, 0.05 / ((norm.item() if clip == "per_param" else last) + 1e-6))
                last = norms.norm().item()
                optimizer.step()
                optimizer.zero_grad()
            assert last > 0.05
        runs.append(weights(model))
    torch.testing.assert_close(*runs, rtol=1e-6, atol=1e-7)


def test_a_gradient_that_is_gone_is_not_read() -> None:
    """Clipping afterwards and a second backward pass are refused; zero_grad is not."""
    model = network()
    optimizer = build("sara_adamw", model)
    optimizer.enable_step_in_backward(model)
    x, y = batch(0)
    (model(x) - y).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"pass clip='per_param' or 'lagged_global' to enable_step_in_backward"):
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.raises(RuntimeError, match=r"call optimizer.step\(\) after the last micro-batch"):
        (model(x) - y).square().mean().backward()
    optimizer.zero_grad(set_to_none=False)


class Branches(nn.Module):
    """Two layers of which each micro-batch uses one, between two that all of them use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.left, self.right, self.last = (nn.Linear(20, 20, dtype=torch.float64) for _ in range(4))

    def forward(self, x: Tensor, right: bool) -> Tensor:
        return self.last((self.right if right else self.left)(self.first(x).tanh()).tanh())


@pytest.mark.parametrize("recipe", [*RECIPES, "backward-side"])
@pytest.mark.parametrize("left", [(0, 2), (0, 1), (2,), ()], ids=str)
def test_fewer_micro_batches(recipe: str, left: tuple[int, ...]) -> None:
    """Layers that some micro-batches use, and short tails, step on what they got: the weights are those of stepping
    afterwards, over refreshes.
    """
    runs = []
    for in_backward in (True, False):
        model = Branches()
        if recipe == "backward-side":
            subspan.project_backward(model, rank=6, share="none")
        optimizer = build("golore_adamw" if recipe == "backward-side" else recipe, model)
        if in_backward:
            optimizer.enable_step_in_backward(model, accumulate=3)
        for step in range(STEPS):
            for part in range(3 if step % 3 else 2):  # every third step is short
                (model(batch(3 * step + part)[0], part not in left).square().mean() / 3).backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(weights(model))
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_drops_what_has_been_summed(set_to_none: bool) -> None:
    """As in torch: what comes before ``zero_grad`` does not count."""
    runs = []
    for dropped in (0, 1, 2):
        model = network()
        optimizer = build("sara_adamw", model)
        optimizer.enable_step_in_backward(model, accumulate=3)
        for step in range(STEPS):
            for part in range(dropped):
                model(batch(100 + part)[0]).square().mean().backward()
            optimizer.zero_grad(set_to_none=set_to_none)
            train(model, optimizer, 3 if step % 2 else 1, [step])
        runs.append(weights(model))
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("gap", [1, 1000])
def test_the_norm_is_that_of_what_was_used(parts: int, gap: int) -> None:
    """Of gradients where bases are due, and of ``R = G Q`` between; also when the last micro-batches are missing."""
    model, plain = network(), network()
    optimizer = build("sara_adamw", model, update_proj_gap=gap)
    optimizer.enable_step_in_backward(model, accumulate=2)
    for step in range(2):
        plain.load_state_dict(model.state_dict())
        x, y = batch(step)
        for part in range(parts):
            for one in (model, plain):
                ((one(x * (part + 1)) - y).square().mean() / 2).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
        bases = {own.name: own.basis() for own in subspan.subspaces(optimizer)}
        squares = []
        for name, p in plain.named_parameters():
            G, Q = p.grad, bases.get(name)
            if step and gap > 1 and Q is not None:
                G = G @ Q.double() if Q.shape[0] == G.shape[1] else G.T @ Q.double()
            squares.append(G.square().sum())
        torch.testing.assert_close(norm, torch.stack(squares).sum().sqrt(), rtol=1e-6, atol=0.0)
        for foreach in (True, False):
            assert norm == nn.utils.get_total_norm([p.grad for p in model.parameters()], foreach=foreach)
        optimizer.step()
        plain.zero_grad()


@pytest.mark.parametrize("clip", ["per_param", "lagged_global"])
def test_clipping_afterwards_to_the_same_norm_changes_nothing(clip: Any) -> None:
    """Trainers call ``clip_grad_norm_`` whatever has been clipped before; another norm than that would be a lie."""
    runs = []
    for asked in (False, True):
        model = network()
        optimizer = build("sara_adamw", model)
        optimizer.enable_step_in_backward(model, clip=clip, max_norm=0.05)
        for step in range(STEPS):
            x, y = batch(step)
            (model(x) - y).square().mean().backward()
            if asked:
                for foreach in (None, False, True):
                    assert nn.utils.clip_grad_norm_(model.parameters(), 0.05, foreach=foreach) > 0.05
                with pytest.raises(
                    RuntimeError, match=r"clip_grad_norm_: max_norm=0.02, but gradients .*max_norm=0.05"
                ):
                    nn.utils.clip_grad_norm_(model.parameters(), 0.02)
            optimizer.step()
            optimizer.zero_grad()
        runs.append(weights(model))
    assert torch.equal(*runs)


def test_a_stand_in_answers_nothing_else() -> None:
    """Scaling a gradient by hand, another norm and its values are refused, before and after the step."""
    model = network()
    optimizer = build("sara_adamw", model)
    optimizer.enable_step_in_backward(model, accumulate=2, clip="per_param")
    for _ in range(2):
        model(batch(0)[0]).square().mean().backward()
        grad = model[0].weight.grad
        for read in (
            lambda grad=grad: grad.mul_(0.5),
            lambda grad=grad: grad.mul_(torch.full((30, 20), 0.5)),
            lambda grad=grad: grad.norm(float("inf")),
            lambda grad=grad: grad.norm(dim=0),
            lambda grad=grad: grad.sum(),
            lambda grad=grad: torch.zeros_like(grad).add_(grad),
            lambda grad=grad: nn.utils.clip_grad_value_(model.parameters(), 0.1),
        ):
            with pytest.raises(
                RuntimeError, match="this gradient has been stepped on in the backward pass and is gone"
            ):
                read()


def test_more_micro_batches_than_were_announced() -> None:
    model = network()
    optimizer = build("sara_adamw", model)
    optimizer.enable_step_in_backward(model, accumulate=2)
    for _ in range(2):
        model(batch(0)[0]).square().mean().backward()
    for p in model.parameters():
        p.grad = None
    with pytest.raises(RuntimeError, match=r"number 3 since the last step, with accumulate=2; call optimizer.step\(\)"):
        model(batch(0)[0]).square().mean().backward()


def test_errors() -> None:
    model = network()
    optimizer = build("sara_adamw", model)
    for settings, words in (
        ({"accumulate": 0}, "accumulate=0: expected the number of micro-batches"),
        ({"clip": "global"}, "clip='global': expected 'none', 'per_param' or 'lagged_global'"),
        ({"max_norm": 0.0}, "max_norm=0.0: expected a number > 0"),
    ):
        with pytest.raises(ValueError, match=words):
            optimizer.enable_step_in_backward(model, **settings)
    with pytest.raises(ValueError, match="holds none of this optimizer's parameters"):
        optimizer.enable_step_in_backward(network())


def test_ddp_is_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = network()
        wrapped = nn.parallel.DistributedDataParallel(model)
        with pytest.raises(ValueError, match="before it has been averaged over the ranks"):
            build("sara_adamw", model).enable_step_in_backward(wrapped)
    finally:
        del wrapped
        dist.destroy_process_group()


def test_the_lagged_norm_has_its_place_before_the_first_step() -> None:
    """``torch.distributed.checkpoint`` loads into the keys that a fresh optimizer has."""
    model = nn.Sequential(nn.Linear(16, 16))
    optimizer = subspan.create("sara_adamw", model, rank=4)
    optimizer.enable_step_in_backward(model, clip="lagged_global")
    assert optimizer.state_dict()["param_groups"][0]["lagged_norm"] == 0.0
