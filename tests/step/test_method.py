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
from subspan.selectors import Importance, Lazy, Random, Switch
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


TAKEN = ["exp_avg", "step", "refresh_step", "displacement", "exp_avg.codes", "exp_avg_sq.absmax"]


@pytest.mark.parametrize("entry", TAKEN)
def test_a_state_entry_has_one_owner(entry):
    """Also names that another part takes only under some settings: the proximal term, moments in 8 bits."""

    @dataclasses.dataclass(frozen=True)
    class Greedy(Random):
        def init(self, G, rank):
            return {**super().init(G, rank), entry: torch.zeros(2)}

    with pytest.raises(SettingError, match=rf"its state entry '{entry}' belongs to the .*; give it a name of its own"):
        subspan.SubspaceAdamW(net(), rank=4, selector=Greedy())


@pytest.mark.parametrize(("holder", "entry"), [(lambda s: Switch(s, Random(), at=3), "switched"), (Lazy, "stretch")])
def test_a_selector_of_selectors_keeps_its_entry_to_itself(holder, entry):
    @dataclasses.dataclass(frozen=True)
    class Greedy(Random):
        def init(self, G, rank):
            return {**super().init(G, rank), entry: 7}

    with pytest.raises(SettingError, match=rf"its state entry '{entry}' belongs to what holds it"):
        subspan.SubspaceAdamW(net(), rank=4, selector=holder(Greedy()))


@pytest.mark.parametrize("name", ["params", "initial_lr", "lagged_norm", "clock", "method"])
def test_a_rules_setting_must_not_have_a_name_that_a_group_gets_later(name):
    fields = [(name, float, dataclasses.field(default=1.0))]
    named = dataclasses.make_dataclass("Named", fields, bases=(SGD,), frozen=True)
    with pytest.raises(SettingError, match=f"its setting '{name}' is one of every parameter group"):
        subspan.create("sara_sgd", net(), rank=4, rule=named())


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
    third = subspan.SubspaceAdamW(net(), rank=4, update_proj_gap=2)
    third.load_state_dict(second.state_dict())
    assert (third.seed, third.stagger) == (3, True)


def test_a_method_that_is_replaced_is_saved():
    """The groups say what the optimizer does, whenever it was told."""
    optimizer = subspan.SubspaceAdamW(net(), rank=4)
    optimizer.method = dataclasses.replace(optimizer.method, stagger=True, seed=8)
    other = subspan.SubspaceAdamW(net(), rank=4)
    other.load_state_dict(optimizer.state_dict())
    assert (other.stagger, other.seed) == (True, 8)
    added = nn.Parameter(torch.zeros(9, 8))
    other.add_param_group({"params": [("added", added)], "rank": 2})
    assert len({group["method"] for group in other.param_groups}) == 1


def test_a_group_made_from_another_optimizers_is_this_ones():
    """Nothing of the other's method is taken over, at once or when a checkpoint is loaded."""
    first = subspan.SubspaceAdamW(net(), rank=4, seed=3)
    second = subspan.SubspaceAdamW(first.param_groups, rank=4, seed=5)
    second.load_state_dict(second.state_dict())
    assert second.seed == 5
    for key in ("seed", "method", "clock"):
        with pytest.raises(SettingError, match=rf"overrides\['up'\]: '{key}' is no setting"):
            subspan.create("sara_adamw", net(), rank=4, overrides={"up": {key: 5}})


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
        group["method"], _, _ = group["method"].partition("; {")
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


def test_two_parameters_never_share_a_draw():
    """Names that differ only by a wrapper's component are kept apart, in draws and in checkpoints."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.fc = nn.ModuleDict({"fc": nn.Linear(12, 10)}), nn.Linear(12, 10)

    model = Both()
    optimizer = subspan.SubspaceAdamW(model, rank=3, selector="random")
    names = [slot.name for slot in optimizer.slots()]
    assert len(set(names)) == len(names) == 4
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    first, second = (optimizer.state[p]["basis"] for p in (model.fc.weight, model.module["fc"].weight))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("settings", "projected"),
    [
        ({"exclude": (r"^module\.0",)}, ["2.weight"]),
        ({"exclude": (r"^0",)}, ["2.weight"]),
        ({"targets": r"module\.0"}, ["0.weight"]),
        ({"targets": ["module.0"]}, ["0.weight"]),
        ({"targets": r"0"}, ["0.weight"]),
        ({"overrides": {r"module\.0": {"rank": 2}}}, ["0.weight", "2.weight"]),
    ],
    ids=str,
)
def test_a_pattern_may_mean_a_name_with_or_without_the_wrapper(settings, projected):
    model = nn.DataParallel(nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 9)))
    optimizer = subspan.create("sara_adamw", model, rank=3, **settings)
    assert sorted(slot.name for slot in optimizer.slots() if slot.layout.side) == projected


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
        next(twin.parameters()).grad.sum()
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
