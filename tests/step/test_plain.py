"""The optimizer against the plain statement of its step, for every part, transfer and proximal term, pair by pair."""

import itertools
import math

import pytest
import torch
from support.helpers import EVERY_RULE, EVERY_SELECTOR
from support.pairs import cover

from subspan import SubspaceOptimizer
from subspan.parts import Key
from subspan.residuals import Discard, ErrorFeedback, Fira, Sketch
from subspan.rules import SGD
from subspan.step.plain import plain_full_rank_step, plain_step
from subspan.storage.allocation import allocate

SHAPES = {"tall": (24, 10), "wide": (10, 24), "square": (12, 12), "full rank": (3, 9), "vector": (7,)}
RANK, GAP, STEPS = 4, 3, 8
LR, SCALE, DECAY = 3e-2, 0.5, 0.1
PROXIMAL = {"none": (None, "coupled"), "coupled": (1.5, "coupled"), "decoupled": (1.5, "decoupled")}
RESIDUALS = [
    Discard(), Fira(), Fira("official", None, scaled=True), ErrorFeedback(), Sketch(), Sketch(0.3, draw="cosines"),
    Sketch(3, None, "root", None, "coordinates"), Sketch(100, weight="one", limiter=1.1),
]  # fmt: skip
ROWS = [
    row
    for row in itertools.product(
        EVERY_SELECTOR,
        [*EVERY_RULE, SGD(0.0)],
        RESIDUALS,
        ("keep", "rotate", "moments", "reset"),
        PROXIMAL,
        (torch.float64, torch.float32),
    )
    if (row[0].orthonormal or not row[2].needs_orthonormal) and (row[4] == "none" or not row[0].tracks)
]


def gradient(name, step, dtype):
    """Return a gradient that depends only on the name and the step; one is zero, where a basis is due."""
    generator = torch.Generator().manual_seed(sum(name.encode()) + 100 * step)
    G = torch.randn(SHAPES[name], generator=generator, dtype=torch.float64).to(dtype)
    if name == "tall" and step == GAP:
        G = torch.zeros_like(G)
    return G


@pytest.mark.parametrize("row", cover(ROWS), ids=lambda row: "-".join(map(str, row)))
def test_every_pair_takes_the_plain_step(row):
    compare(row)


@pytest.mark.slow
@pytest.mark.parametrize("selector", EVERY_SELECTOR, ids=str)
def test_the_full_product_takes_the_plain_step(selector):
    for row in ROWS:
        if row[0] == selector:
            compare(row)


def compare(row):
    """Train both side by side, and compare every weight."""
    selector, rule, residual, transfer, proximal, dtype = row
    eta, kind = PROXIMAL[proximal]
    named = {name: torch.nn.Parameter(gradient(name, 99, dtype)) for name in SHAPES}
    plain = {name: p.detach().clone() for name, p in named.items()}
    optimizer = SubspaceOptimizer(
        [{"params": list(named.items()), "rank": RANK}], LR, selector=selector, rule=rule, residual=residual,
        transfer=transfer, update_proj_gap=GAP, scale=SCALE, weight_decay=DECAY, eta=eta, proximal=kind,
    )  # fmt: skip
    states, last = {}, dict.fromkeys(SHAPES, -1)
    for name, sides in SHAPES.items():
        W = plain[name]
        if len(sides) < 2 or min(sides) <= RANK:
            states[name] = rule.init(W, tuple(W.shape), -2)
            continue
        turned = sides[0] < sides[1]  # its rows are compressed
        G = W.T if turned else W
        shape = (len(G), RANK)
        states[name] = {**rule.init(G, shape, -1 if turned else -2), **selector.init(G, RANK), **residual.init(G)}
        if eta is not None:
            states[name]["displacement"] = allocate(G, shape)
    for step in range(STEPS):
        for name, p in named.items():
            p.grad = gradient(name, step, dtype)
        optimizer.step()
        for name, sides in SHAPES.items():
            W, G, state = plain[name], gradient(name, step, dtype), states[name]
            if len(sides) < 2 or min(sides) <= RANK:
                plain[name] = plain_full_rank_step(W, G, state, rule=rule, lr=LR, weight_decay=DECAY)
                continue
            period = selector.period(GAP, state)
            due = last[name] < 0 or (period is not None and last[name] < step - step % period)
            if due and (G.any() or "error" in state):  # what is fed back is no zero
                last[name] = step
            turned = sides[0] < sides[1]
            new = plain_step(
                W.T if turned else W, G.T if turned else G, state, Key(0, name, step), due=due, selector=selector,
                rule=rule, residual=residual, transfer=transfer, lr=LR, scale=SCALE, weight_decay=DECAY, eta=eta,
                coupled=kind == "coupled",
            )  # fmt: skip
            plain[name] = new.T if turned else new
    exact = 1e-9 if dtype == torch.float64 else 2e-5
    for name, p in named.items():
        assert math.isfinite(float(p.detach().sum())), name
        torch.testing.assert_close(
            p.detach(), plain[name], rtol=exact, atol=exact, msg=lambda said, name=name: f"{name}: {said}"
        )
        assert not torch.equal(plain[name], gradient(name, 99, dtype)), f"{name} has not moved"


def test_the_oracle_can_fail():
    """Another learning rate, another scale or another seed is another weight: the comparison would tell."""
    from subspan.rules import AdamW
    from subspan.selectors import Importance

    W, G = gradient("tall", 99, torch.float64), gradient("tall", 1, torch.float64)
    parts = {"selector": Importance(), "rule": AdamW(), "residual": Discard(), "transfer": "keep"}

    def stepped(lr=LR, scale=SCALE, seed=0):
        state = {**parts["rule"].init(W, (len(W), RANK), -2), **parts["selector"].init(W, RANK)}
        return plain_step(W, G, state, Key(seed, "tall", 0), due=True, **parts, lr=lr, scale=scale, weight_decay=DECAY)

    for other in (stepped(lr=2 * LR), stepped(scale=2 * SCALE), stepped(seed=1)):
        with pytest.raises(AssertionError):
            torch.testing.assert_close(stepped(), other, rtol=1e-9, atol=1e-9)
