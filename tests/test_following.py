"""An optimizer follows its parameters: what changes the model after it was built changes no step, or is refused."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.helpers import net, snapshot
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import subspan

X = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))


def make(model: nn.Module, name: str = "sara_adamw", **settings: Any) -> Any:
    return subspan.create(name, model, **{"rank": 4, "lr": 1e-2, "update_proj_gap": 2, **settings})


def train(model: nn.Module, optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        model(X.to(next(model.parameters()).dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def model_of(execution: str) -> nn.Module:
    model = net()
    if execution == "backward":
        subspan.project_backward(model, rank=4, share="none")
    return model


def check_equal(model: nn.Module, other: nn.Module) -> None:
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


def through_meta(model: nn.Module) -> None:
    """Gives the model other parameters of the same values."""
    values = {name: value.clone() for name, value in model.state_dict().items()}
    model.to("meta")
    model.to_empty(device="cpu")
    model.load_state_dict(values)


def other_layer(model: Any) -> None:
    torch.manual_seed(3)
    model.norm = nn.LayerNorm(40)
    model.norm.weight.data.normal_()


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "bf16": lambda model: model.to(torch.bfloat16),
    "fp64": lambda model: model.double(),
    "other parameters": through_meta,
    "other parameters, other dtype": lambda model: (through_meta(model), model.double()),
    "another layer": other_layer,
}
METHODS: list[tuple[str, str, dict[str, Any]]] = [
    ("sara_adamw", "plain", {}),
    ("fira_adamw", "plain", {}),
    ("golore_adamw", "plain", {"state_dtype": "int8", "min_8bit_size": 1}),
    ("grass_adamw", "plain", {}),
    ("adafactor", "plain", {}),
    ("online_pca_adamw", "plain", {}),
    ("sara_adamw", "backward", {}),
    ("rso_adamw", "backward", {"eta": 10.0}),
]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize(("name", "execution", "settings"), METHODS)
@pytest.mark.parametrize("before", [0, 3])
def test_equals_an_optimizer_built_last(
    name: str, execution: str, settings: dict[str, Any], change: Callable[[nn.Module], Any], before: int
) -> None:
    """The model changes before the first step, or after some: the steps are those of an optimizer that is built after
    the change, and into which the state of before is loaded.
    """
    model, other = model_of(execution), model_of(execution)
    optimizer, first = make(model, name, **settings), make(other, name, **settings)
    train(model, optimizer, before)
    train(other, first, before)
    saved = snapshot(first)
    change(model)
    change(other)
    last = make(other, name, **settings)
    if before:
        last.load_state_dict(saved)
    train(model, optimizer, 5)
    train(other, last, 5)
    check_equal(model, other)
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 1)


@pytest.mark.parametrize("execution", ["plain", "backward"])
def test_a_model_that_starts_on_meta(execution: str) -> None:
    with torch.device("meta"):
        model = model_of(execution)
    other = model_of(execution)
    optimizer = make(model)
    model.to_empty(device="cpu")
    model.load_state_dict(other.state_dict())
    train(model, optimizer, 4)
    train(other, make(other), 4)
    check_equal(model, other)


def test_parameters_that_cannot_be_found_are_said() -> None:
    """Names without a model lead to no other parameters."""
    with torch.device("meta"):
        model = net()
    optimizer = subspan.SubspaceAdamW(model.named_parameters(), rank=4)
    model.to_empty(device="cpu")
    model(X).sum().backward()
    with pytest.raises(ValueError, match=r"'up.weight' is on meta and has no gradient.*give the optimizer the model"):
        optimizer.step()


def test_a_step_without_any_gradient_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    optimizer = make(model)
    for _ in range(3):
        optimizer.step()
    assert caplog.text.count("no parameter of this optimizer has a gradient") == 1


@pytest.mark.parametrize("execution", ["plain", "backward"])
def test_step_in_backward_follows(execution: str) -> None:
    """Also where other parameters get the gradients; the hooks are theirs from the first step on."""
    model, other = model_of(execution), model_of(execution)
    optimizer = make(model)
    optimizer.enable_step_in_backward(model)
    through_meta(model)
    model.double()
    other.double()
    last = make(other)
    last.enable_step_in_backward(other)
    train(model, optimizer, 4)
    train(other, last, 4)
    check_equal(model, other)
    model(X.double()).sum().backward()
    with pytest.raises(RuntimeError, match="has been stepped on in the backward pass"):
        model.up.bias.grad.sum()  # type: ignore[union-attr]


def test_displacements_follow() -> None:
    """What has been added up in a carrier is not lost with a cast."""
    models = net(), net()
    for model in models:
        subspan.project_backward(model, rank=4, share="none", merge="refresh")
    optimizers = [make(model, "rso_adamw", update_proj_gap=7) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 3)
    models[0].double()
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 6)
    for name, value in models[1].state_dict().items():
        torch.testing.assert_close(models[0].state_dict()[name].float(), value, rtol=1e-3, atol=1e-4)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.inner = nn.Embedding(50, 16), nn.Linear(16, 16)
        self.lm_head = nn.Linear(16, 50, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.inner(self.embed(ids)))
        return logits


def test_weights_untied_later() -> None:
    """The head is in no group, so it would not be trained."""
    model = Tied()
    optimizer = make(model)
    model.lm_head.weight = nn.Parameter(model.embed.weight.detach().clone())
    model(torch.arange(50)).square().mean().backward()
    with pytest.raises(ValueError, match=r"'lm_head.weight' was tied to 'embed.weight'.*give it to add_param_group"):
        optimizer.step()
    optimizer.add_param_group({"params": [("lm_head.weight", model.lm_head.weight)]})
    before = model.lm_head.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.lm_head.weight, before)


def resize(model: Tied, size: int) -> None:
    """What transformers does: the same parameter, with more rows, and the layer says so."""
    torch.manual_seed(1)
    model.embed.weight.data = torch.randn(size, 16)
    model.embed.num_embeddings = model.lm_head.out_features = size


def test_resized_embeddings() -> None:
    """Before the first step they are followed, and refused later. A shape that the layer does not have is no resize."""
    model, other = Tied(), Tied()
    optimizer = make(model)
    resize(model, 60)
    resize(other, 60)
    last = make(other)
    for _ in range(3):
        for m, o in ((model, optimizer), (other, last)):
            m(torch.arange(60)).square().mean().backward()
            o.step()
            o.zero_grad()
    check_equal(model, other)
    resize(model, 70)
    model(torch.arange(70)).square().mean().backward()
    before, weights = snapshot_of(optimizer), [p.detach().clone() for p in model.parameters()]
    with pytest.raises(
        ValueError, match=r"'embed.weight' was \(60, 16\) when it was stepped on last, and is \(70, 16\)"
    ):
        optimizer.step()
    assert [list(state) for state in snapshot_of(optimizer)] == [list(state) for state in before]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))


def snapshot_of(optimizer: Any) -> list[dict[str, Any]]:
    return [dict(state) for state in optimizer.state.values()]


@pytest.mark.parametrize("shape", [(300, 16), (512,)])
def test_a_shape_that_the_layer_does_not_have(shape: tuple[int, ...]) -> None:
    model = Tied()
    optimizer = make(model)
    model.embed.weight.data = torch.zeros(shape)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"'embed.weight' was \(50, 16\) when the optimizer was built.*fully_shard"):
        optimizer.step()


def test_one_flat_tensor_for_several_is_refused() -> None:
    """As DeepSpeed exchanges them. Nothing that the optimizer does with it is a bare KeyError."""
    model = net()
    optimizer = make(model)
    for group in optimizer.param_groups:
        flat = torch.cat([p.detach().reshape(-1) for p in group["params"]]).requires_grad_()
        flat.grad = torch.ones_like(flat)
        group["params"] = [flat]
    for act in (
        optimizer.step,
        optimizer.state_dict,
        lambda: copy.deepcopy(optimizer),
        lambda: list(optimizer.slots()),
    ):
        with pytest.raises(ValueError, match=r"group 0 was built with 2 parameters, such as 'up.weight'.*fully_shard"):
            act()


def test_a_parametrized_weight_is_refused() -> None:
    model: Any = net()
    optimizer = make(model)
    weight_norm(model.up)
    model(X).sum().backward()
    with pytest.raises(ValueError, match=r"has no 'up.weight' any more, but 'up.parametrizations.weight.original0', "):
        optimizer.step()


def test_a_backward_side_layer_that_has_been_replaced_is_refused() -> None:
    model: Any = model_of("backward")
    optimizer = make(model)
    model.up = nn.Linear(24, 40)
    model(X).sum().backward()
    with pytest.raises(ValueError, match=r"has no 'up.carrier' any more, but 'up.weight'"):
        optimizer.step()


def test_a_parametrization_that_keeps_the_parameter_is_none_of_ours() -> None:
    class Double(nn.Module):
        def forward(self, W: Tensor) -> Tensor:
            return 2 * W

    model: Any = net()
    optimizer = make(model)
    before = model.up.weight.detach().clone()
    nn.utils.parametrize.register_parametrization(model.up, "weight", Double())
    train(model, optimizer, 1)
    assert not torch.equal(model.up.parametrizations.weight.original, before)


def test_parameters_that_nobody_trains_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = net()
    model.up.requires_grad_(False)
    optimizer = make(model)
    model.up.requires_grad_(True)
    with caplog.at_level(logging.WARNING, "subspan"):
        train(model, optimizer, 3)
    assert (
        caplog.text.count("in no group, so they are not trained; give them to add_param_group: up.weight, up.bias") == 1
    )
    optimizer.add_param_group({"params": [("up.weight", model.up.weight), ("up.bias", model.up.bias)], "rank": 4})
    before = model.up.weight.detach().clone()
    train(model, optimizer, 1)
    assert not torch.equal(model.up.weight, before)


@pytest.mark.parametrize("execution", ["plain", "backward"])
def test_frozen_between_steps(execution: str) -> None:
    """A frozen layer stands still, and goes on with its state when it is unfrozen."""
    model: Any = model_of(execution)
    optimizer = make(model)
    train(model, optimizer, 3)
    trained = [p for p in model.up.parameters() if p.requires_grad]
    before = {name: value.clone() for name, value in model.up.state_dict().items()}
    for p in trained:
        p.requires_grad_(False)
    train(model, optimizer, 2)
    assert all(torch.equal(value, before[name]) for name, value in model.up.state_dict().items())
    for p in trained:
        p.requires_grad_(True)
    train(model, optimizer, 2)
    assert not torch.equal(model.up.weight, before["weight"])
    assert optimizer.state[trained[0]]["step"] == 5


def test_parameters_put_into_and_taken_out_of_the_groups() -> None:
    model = net()
    optimizer = make(model)
    extra = nn.Parameter(torch.randn(5))
    optimizer.param_groups[1]["params"].append(extra)
    extra.grad = torch.ones(5)
    optimizer.step()
    assert optimizer.state[extra]["step"] == 1
    optimizer.load_state_dict(optimizer.state_dict())
    gone = optimizer.param_groups[0]["params"].pop(0)
    train(model, optimizer, 1)
    assert gone not in optimizer.state
    assert optimizer.param_groups[0]["param_names"] == ["down.weight"]
    optimizer.param_groups.pop()
    train(model, optimizer, 1)
    assert len(optimizer.state) == 1
    optimizer.load_state_dict(optimizer.state_dict())


def test_a_copy_follows_its_own_model() -> None:
    model = net()
    optimizer = make(model)
    train(model, optimizer, 3)
    twin, other = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (twin, other)):
        through_meta(m)
        m.double()
        train(m, o, 3)
    check_equal(model, twin)


def test_foreign_entries_of_a_state() -> None:
    """What others keep there moves along, is saved and is loaded; what is missing from a checkpoint of ours is not."""
    model, other = net(), net()
    optimizer, loaded = make(model), make(other)
    train(model, optimizer, 2)
    for p in model.parameters():
        optimizer.state[p] |= {"z": p.detach().clone(), "count": 3, "name": "z"}
    model.double()
    saved = snapshot(optimizer)
    loaded.load_state_dict(saved)
    train(model, optimizer, 1)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(loaded.state[q]["z"].double(), optimizer.state[p]["z"].double())
        assert (loaded.state[q]["count"], loaded.state[q]["name"]) == (3, "z")
    for state in saved["state"].values():
        del state["z"]
    loaded.load_state_dict(saved)
    assert not any("z" in state for state in loaded.state.values())
    saved["state"][0]["displacement"] = torch.zeros(40, 4)
    with pytest.raises(ValueError, match=r"the checkpoint holds .*'displacement'"):
        loaded.load_state_dict(saved)


@pytest.mark.parametrize("first", ["named", "bare"])
@pytest.mark.parametrize("later", ["named", "bare", "one tensor", "generator"])
def test_groups_of_another_form_than_the_first(first: str, later: str) -> None:
    """As those who unfreeze a model in the course of training add them: all train, and are saved and loaded."""
    models: list[Any] = [net(), net()]
    optimizers = []
    for model in models:
        model.up.requires_grad_(False)
        rest = [p for p in model.parameters() if p.requires_grad]
        optimizer = make(model) if first == "named" else subspan.SubspaceAdamW(rest, rank=4, lr=1e-2)
        train(model, optimizer, 2)
        model.up.requires_grad_(True)
        weight = model.up.weight
        params = {"named": [("up.weight", weight)], "bare": [weight], "one tensor": weight, "generator": iter([weight])}
        optimizer.add_param_group({"params": params[later], "rank": 4, "lr": 1e-3})
        optimizers.append(optimizer)
    before = models[0].up.weight.detach().clone()
    train(models[0], optimizers[0], 2)
    assert not torch.equal(models[0].up.weight, before)
    if first == "named":
        assert optimizers[0].param_groups[-1]["param_names"] == ["up.weight"]
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    models[1].load_state_dict(models[0].state_dict())
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 2)
    check_equal(*models)
