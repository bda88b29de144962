"""The contract, kept by every selector with every rule, residual, transfer and storage that go together."""

import copy
import dataclasses
import io
import itertools
import pickle

import pytest
import torch
from support.helpers import EVERY_RULE, EVERY_SELECTOR, NoSync, assert_same
from support.pairs import cover, every_pair, pairs

from subspan import SubspaceOptimizer
from subspan.residuals import Discard, ErrorFeedback, Fira, Sketch
from subspan.rules import SGD

TRANSFERS = ("keep", "rotate", "moments", "reset")
RESIDUALS = [
    Discard(),
    Fira(),
    Fira("official", None),
    ErrorFeedback(),
    Sketch(),
    Sketch(0.3, None, "root", None, "cosines"),
]
RULES = [*EVERY_RULE, SGD(0.0)]
AXES = (EVERY_SELECTOR, RULES, RESIDUALS, TRANSFERS, ("float32", "int8"))
TABLE = [
    row
    for row in itertools.product(*AXES)
    if (row[0].orthonormal or not row[2].needs_orthonormal) and (row[1].moments or row[4] == "float32")
]
SHAPES = {"tall": (48, 20), "wide": (20, 48), "square": (16, 16), "thin": (30, 1), "small": (4, 9), "stack": (2, 12, 8),
          "kernel": (12, 3, 2, 2), "vector": (17,), "scalar": ()}  # fmt: skip
LARGE = (600, 20)  # its moments, of 4,200 entries, are kept in 8 bits
RANK, GAP = 7, 3


def build(row, seed=0):
    """Parameters of every shape, one of them in bf16 and one large, in two groups; lr is a tensor in one."""
    selector, rule, residual, transfer, storage = row
    generator = torch.Generator().manual_seed(seed)
    named = [(name, torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()]
    named += [("half", torch.randn(24, 16, generator=generator).bfloat16())]
    named += [("large", torch.randn(LARGE, generator=generator))] if storage == "int8" else []
    named = [(name, torch.nn.Parameter(value)) for name, value in named]
    groups = [
        {"params": [pair for pair in named if pair[1].ndim > 1], "rank": RANK, "lr": torch.tensor(1e-2), "fused": None},
        {"params": [pair for pair in named if pair[1].ndim < 2], "rank": None, "initial_lr": 1e-2},
    ]
    settings = {"update_proj_gap": GAP, "weight_decay": 0.1, "state_dtype": storage, "stagger": True}
    parts = {"selector": selector, "rule": rule, "residual": residual, "transfer": transfer}
    return SubspaceOptimizer(groups, 1e-2, **parts, **settings), dict(named)


def step(optimizer, parameters, number):
    """Takes a step on gradients that depend only on the number; the wide weight has none at step 2. The gradients are
    not written to.
    """
    generator = torch.Generator().manual_seed(1000 + number)
    grads = {name: torch.randn(p.shape, generator=generator).to(p.dtype) for name, p in parameters.items()}
    for name, p in parameters.items():
        p.grad = None if (name, number) == ("wide", 2) else grads[name].clone()

    def closure():
        assert torch.is_grad_enabled()
        return 0.5

    assert optimizer.step(closure) == 0.5
    for name, p in parameters.items():
        assert p.grad is None or torch.equal(p.grad, grads[name]), f"the gradient of {name} was written to"


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def tensors(optimizer):
    return {
        (index, key): value
        for index, state in enumerate(optimizer.state.values())
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def values(parameters):
    return {name: p.detach().clone() for name, p in parameters.items()}


def test_the_ordinary_run_loses_no_pair():
    """Every two parts, of two axes, that may go together meet in a case that is not slow."""
    cases = [case.values[0] for case in test_contract.pytestmark[0].args[1] if not case.marks]
    assert cases == cover(TABLE)
    meet = {pair for row in cases for pair in pairs(row)}
    for (i, first), (j, second) in itertools.combinations(enumerate(AXES), 2):
        for a, b in itertools.product(first, second):
            allowed = any(row[i] == a and row[j] == b for row in TABLE)
            assert ((i, a, j, b) in meet) is allowed, (a, b)


@every_pair("row", TABLE)
def test_contract(row):
    """State is tensors and integers, complete from the start and never replaced; numbers stay finite. A run that is
    saved through a file and resumed has the bits of one that was not (R1, R2, R3, R6, R7, R8, R9).
    """
    optimizer, parameters = build(row)
    held, keys = tensors(optimizer), [list(state) for state in optimizer.state.values()]
    assert len(optimizer.state) == len(parameters)
    assert all(type(v) in (int, torch.Tensor) for state in optimizer.state.values() for v in state.values())
    for number in range(4):
        step(optimizer, parameters, number)
    saved, weights = through_a_file(optimizer.state_dict()), values(parameters)
    for number in range(4, 8):
        step(optimizer, parameters, number)
    assert all(p.isfinite().all() for p in parameters.values())
    assert [list(state) for state in optimizer.state.values()] == keys
    assert all(value is held[where] for where, value in tensors(optimizer).items())

    resumed, others = build(row, seed=1)
    with torch.no_grad():
        for name, p in others.items():
            p.copy_(weights[name])
    resumed.load_state_dict(state_dict=saved)
    for number in range(4, 8):
        step(resumed, others, number)
    assert_same(values(others), values(parameters))
    assert_same(resumed.state_dict()["state"], optimizer.state_dict()["state"])


@every_pair("row", [row for row in TABLE if row[3] == "rotate" and isinstance(row[2], (Discard, ErrorFeedback))])
def test_no_wait_and_no_trace_of_zeros(row):
    """An ordinary step never waits for the device (R10). What checkpointing code does to a fresh optimizer, a step of
    lr 0 on zero gradients, changes neither weights nor bases (R4).
    """
    optimizer, parameters = build(row)
    before = values(parameters)
    fresh = {where: value.clone() for where, value in tensors(optimizer).items() if where[1] not in ("step",)}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in parameters.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_same(values(parameters), before)
    for where, value in tensors(optimizer).items():
        if where[1] != "step" and not where[1].startswith("exp_avg_sq"):  # Adafactor adds its epsilon
            assert torch.equal(value, fresh[where]), where
    optimizer, parameters = build(row)
    optimizer.method = dataclasses.replace(optimizer.method, stagger=False)
    for number in range(2):
        step(optimizer, parameters, number)
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    with NoSync():
        optimizer.step()


@pytest.mark.parametrize("row", cover(TABLE)[::2], ids=lambda row: "-".join(map(str, row)))
def test_copies_and_new_groups(row):
    """A deep copy and a pickle go on by themselves with the same bits. A group that is added later has all its state at
    once (R15).
    """
    optimizer, parameters = build(row)
    for number in range(4):
        step(optimizer, parameters, number)
    for twin, others in (copy.deepcopy((optimizer, parameters)), pickle.loads(pickle.dumps((optimizer, parameters)))):
        for number in range(4, 7):
            step(twin, others, number)
        again, same = copy.deepcopy((optimizer, parameters))
        for number in range(4, 7):
            step(again, same, number)
        assert_same(values(others), values(same))
    added = torch.nn.Parameter(torch.zeros(24, 18))
    optimizer.add_param_group({"params": [("added", added)], "rank": 3})
    assert "refresh_step" in optimizer.state[added]
    added.grad = torch.randn(24, 18)
    optimizer.step()
    assert added.any()


REFUSED = [
    row
    for row in itertools.product(EVERY_SELECTOR, RULES[:1], RESIDUALS, ("keep",), ("float32",))
    if not row[0].orthonormal and row[2].needs_orthonormal
]


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: "-".join(map(str, row)))
def test_what_does_not_go_together_is_refused(row):
    """The error names the argument, its value and what to use instead."""
    with pytest.raises(
        ValueError, match=r"residual=.*needs an orthonormal basis.*use residuals.Discard\(\), or a selector"
    ):
        build(row)
