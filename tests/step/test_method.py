"""A method: complete parts that go together, names that do not collide, and what a checkpoint carries of it."""

import copy
import dataclasses
import logging
import pickle

import pytest
import torch
from support.helpers import assert_same, net, walk, weights
from torch import nn

import subspan
from subspan.parts import Residual, Rule, Selector
from subspan.residuals import Discard
from subspan.residuals.base import Plain
from subspan.rules import SGD, AdamW
from subspan.selectors import Importance, Random
from subspan.selectors.base import MatrixSelector
from subspan.step.settings import FIELDS, AllStepOptions, StepOptions, StepSettings
from subspan.utils.errors import SettingError

MEMBERS = [(kind, name) for kind in (Selector, Rule, Residual) for name in sorted(kind.__abstractmethods__)]
WHOLE = {Selector: Importance, Rule: AdamW, Residual: Discard}


@pytest.mark.parametrize(("kind", "name"), MEMBERS, ids=lambda value: getattr(value, "__name__", value))
def test_a_part_that_forgets_a_member_is_not_constructed(kind, name):
    """Every member of every protocol, forgotten alone: the error names it."""
    own = {member: getattr(WHOLE[kind], member) for member in kind.__abstractmethods__ if member != name}
    forgetful = dataclasses.dataclass(frozen=True)(type("Forgetful", (kind,), {**own, "__annotations__": {}}))
    with pytest.raises(TypeError, match=rf"Can't instantiate abstract class Forgetful .*\b{name}\b"):
        forgetful()


def test_bases_leave_what_is_to_be_chosen_abstract():
    @dataclasses.dataclass(frozen=True)
    class NoChoice(MatrixSelector):
        pass

    @dataclasses.dataclass(frozen=True)
    class NoCombination(Plain):
        pass

    with pytest.raises(TypeError, match="choose"):
        NoChoice()
    with pytest.raises(TypeError, match="combine"):
        NoCombination()


def test_a_part_that_only_looks_like_one_is_refused_by_the_name_of_what_is_missing():
    @dataclasses.dataclass(frozen=True)
    class Duck:
        def refresh_(self, G, state, key):
            raise AssertionError

    with pytest.raises(
        SettingError, match=r"selector=.*Duck has no init, needs_gradient, orthonormal, period, project"
    ):
        subspan.SubspaceAdamW(net(), rank=4, selector=Duck())


def test_a_rules_setting_must_not_overwrite_one_of_the_group():
    @dataclasses.dataclass(frozen=True)
    class Scaled(SGD):
        scale: float = 3.0

    with pytest.raises(SettingError, match=r"rule=.*Scaled.*its setting 'scale' is one of every parameter group"):
        subspan.create("sara_sgd", net(), rank=4, rule=Scaled())


@pytest.mark.parametrize("entry", ["exp_avg", "step", "refresh_step"])
def test_a_state_entry_has_one_owner(entry):
    @dataclasses.dataclass(frozen=True)
    class Greedy(Random):
        def init(self, G, rank):
            return {**super().init(G, rank), entry: torch.zeros(2)}

    with pytest.raises(
        SettingError, match=rf"its state entry '{entry}' is one of the .* too; give it a name of its own"
    ):
        subspan.SubspaceAdamW(net(), rank=4, selector=Greedy())


def test_a_setting_is_spelled_once_and_its_type_beside_it():
    options = set(StepOptions.__optional_keys__)
    assert options < set(AllStepOptions.__optional_keys__)
    assert set(AllStepOptions.__optional_keys__) | {"lr", "rank", "flatten"} == set(FIELDS)
    optimizer = subspan.SubspaceAdamW(net(), rank=4)
    assert set(FIELDS) <= optimizer.param_groups[0].keys()
    assert StepSettings.of(optimizer.param_groups[0]) == StepSettings(rank=4)


def test_an_unknown_keyword_is_a_type_error_that_says_what_was_meant():
    for build in (
        lambda: subspan.SubspaceAdamW(net(), rank=4, update_proj_gpa=3),
        lambda: subspan.create("sara_adamw", net(), update_proj_gpa=3),
    ):
        with pytest.raises(
            TypeError, match=r"unexpected keyword argument 'update_proj_gpa'; did you mean update_proj_gap"
        ):
            build()


# --- what a checkpoint carries ----------------------------------------------------------------------------------------


def test_seed_and_staggering_are_restored(caplog):
    """A run that is built with another seed goes on as the checkpoint's, and that is said."""
    first_model = net()
    first = subspan.SubspaceAdamW(first_model, rank=4, seed=3, stagger=True, update_proj_gap=2)
    walk(first_model, first, range(3))
    model = net()
    model.load_state_dict(first_model.state_dict())
    second = subspan.SubspaceAdamW(model, rank=4, seed=5, update_proj_gap=2)
    with caplog.at_level(logging.WARNING, "subspan"):
        second.load_state_dict(first.state_dict())
    assert "seed=3 of the checkpoint replaces seed=5" in caplog.text
    assert "stagger=True of the checkpoint replaces stagger=False" in caplog.text
    assert (second.seed, second.stagger) == (3, True)
    walk(first_model, first, range(3, 9))
    walk(model, second, range(3, 9))
    assert_same(weights(model), weights(first_model))
    assert second.state_dict()["param_groups"][0]["seed"] == 3


def test_a_method_that_is_replaced_is_saved():
    """The groups say what the optimizer does, whenever it was told."""
    optimizer = subspan.SubspaceAdamW(net(), rank=4)
    optimizer.method = dataclasses.replace(optimizer.method, stagger=True, seed=8)
    assert {(group["stagger"], group["seed"]) for group in optimizer.state_dict()["param_groups"]} == {(True, 8)}
    other = subspan.SubspaceAdamW(net(), rank=4)
    other.load_state_dict(optimizer.state_dict())
    assert (other.stagger, other.seed) == (True, 8)
    added = nn.Parameter(torch.zeros(9, 8))
    other.add_param_group({"params": [("added", added)], "rank": 2})
    assert other.param_groups[-1]["seed"] == 8


def test_other_settings_of_a_part_are_said(caplog):
    first = subspan.SubspaceAdamW(net(), rank=4, selector=Importance(floor=0.5))
    second = subspan.SubspaceAdamW(net(), rank=4)
    with caplog.at_level(logging.WARNING, "subspan"):
        second.load_state_dict(first.state_dict())
    assert "made with Importance(power=1.0, floor=0.5" in caplog.text
    assert "goes on with Importance(power=1.0, floor=0.0" in caplog.text
    assert second.selector == Importance()


def test_a_checkpoint_of_before_these_keys_loads_in_silence(caplog):
    first = subspan.SubspaceAdamW(net(), rank=4, seed=3)
    saved = first.state_dict()
    for group in saved["param_groups"]:
        for key in ("seed", "stagger", "parts"):
            del group[key]
    second = subspan.SubspaceAdamW(net(), rank=4, seed=5)
    with caplog.at_level(logging.WARNING, "subspan"):
        second.load_state_dict(saved)
    assert not caplog.records
    assert second.seed == 5


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda model: nn.Sequential(nn.ModuleDict({"module": model})), id="module"),
        pytest.param(torch.compile, id="compile"),
    ],
)
def test_a_wrapper_changes_no_draw_and_no_checkpoint(wrap):
    """The names within a wrapper are those without it, so draws and checkpoints are shared."""
    plain_model, inner = net(), net()
    outer = wrap(inner)
    plain = subspan.SubspaceAdamW(plain_model, rank=4, update_proj_gap=2)
    named = [(name.removeprefix("0."), p) for name, p in outer.named_parameters()]
    wrapped = subspan.SubspaceAdamW(named, rank=4, update_proj_gap=2, targets=["up", "down"])
    assert {slot.name for slot in wrapped.slots()} == {slot.name for slot in plain.slots()}
    walk(plain_model, plain, range(3))
    walk(inner, wrapped, range(3))
    assert_same(weights(inner), weights(plain_model))
    wrapped.load_state_dict(plain.state_dict())
    plain.load_state_dict(wrapped.state_dict())


# --- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_a_copy_steps_in_the_backward_pass_too(clone):
    model = net()
    optimizer = subspan.SubspaceAdamW(model, rank=4, update_proj_gap=2)
    optimizer.enable_step_in_backward(model, clip="per_param", max_norm=0.3)

    def train(model, optimizer, steps):
        for step in steps:
            x = torch.randn(5, 24, generator=torch.Generator().manual_seed(step))
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    train(model, optimizer, range(3))
    twin, other = clone((model, optimizer))
    train(model, optimizer, range(3, 6))
    train(twin, other, range(3, 6))
    assert_same(weights(twin), weights(model))
    twin(torch.ones(5, 24)).square().mean().backward()
    with pytest.raises(RuntimeError, match="stepped on in the backward pass"):
        next(twin.parameters()).grad.norm()
    with pytest.raises(
        SettingError, match=r"gradients of a step in the backward pass are under way.*after optimizer.step"
    ):
        clone((twin, other))


def test_a_copy_of_one_that_no_longer_does_does_not():
    model = net()
    optimizer = subspan.SubspaceAdamW(model, rank=4)
    optimizer.enable_step_in_backward(model).remove()
    twin, other = copy.deepcopy((model, optimizer))
    twin(torch.ones(5, 24)).square().mean().backward()
    assert float(next(twin.parameters()).grad.norm()) > 0
    other.step()
