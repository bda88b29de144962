"""GaLore's published optimizers, galore_torch.GaLoreAdamW and GaLoreAdafactor, inside one refresh interval.

Two differences are known and taken out: its epsilon stands before the bias correction (here it is negligible), and its
basis is computed in fp32 (here in fp64, so that the comparison can be strict).
"""

import galore_torch
import pytest
import torch
from galore_torch.galore_projector import GaLoreProjector
from support.helpers import RANK, SHAPES, feed, gradients, parameter

from subspan import SubspaceAdamW, SubspaceOptimizer
from subspan.residuals import Discard
from subspan.rules import Adafactor
from subspan.selectors import Dominant

LR, SCALE, STEPS = 1e-2, 0.25, 50
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
proj_types = pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])


@pytest.fixture
def _exact_basis(monkeypatch):
    def exact(self, weights, rank, type):
        U, _, Vh = torch.linalg.svd(weights, full_matrices=False)
        return Vh[:rank] if type == "right" else U[:, :rank]

    monkeypatch.setattr(GaLoreProjector, "get_orthogonal_matrix", exact)


def galore(p, proj_type, weight_decay=0.0):
    group = {"params": [p], "rank": RANK, "update_proj_gap": 1000, "scale": SCALE, "proj_type": proj_type}
    return galore_torch.GaLoreAdamW([group], lr=LR, eps=1e-30, weight_decay=weight_decay, no_deprecation_warning=True)


def subspan(p, proj_type, weight_decay=0.0):
    return SubspaceAdamW(
        [p], LR, RANK, selector="dominant", update_proj_gap=1000, scale=SCALE, proj_type=proj_type, eps=1e-30,
        weight_decay=weight_decay,
    )  # fmt: skip


@pytest.mark.usefixtures("_exact_basis")
@shapes
@proj_types
def test_every_step_is_galores(shape, proj_type):
    """Fifty steps on the same gradients give the same weights."""
    a, b = parameter(shape), parameter(shape)
    ours, theirs = subspan(a, proj_type), galore(b, proj_type)
    for G in gradients(shape, STEPS):
        torch.testing.assert_close(feed(ours, a, [G]), feed(theirs, b, [G]), rtol=0, atol=1e-10)


@pytest.mark.usefixtures("_exact_basis")
@shapes
@proj_types
def test_weight_decay(shape, proj_type):
    """GaLore decays after the step and we before it, as torch does. With d = 1 - lr * wd and the same gradients its
    weights are d times ours at every step, if they are so at the start: W' <- d (W' - u) against W <- d W - u.
    """
    weight_decay = 0.5
    d = 1 - LR * weight_decay
    a, b = parameter(shape), parameter(shape)
    with torch.no_grad():
        b.mul_(d)
    ours, theirs = subspan(a, proj_type, weight_decay), galore(b, proj_type, weight_decay)
    for G in gradients(shape, STEPS):
        torch.testing.assert_close(d * feed(ours, a, [G]), feed(theirs, b, [G]), rtol=0, atol=1e-10)


@shapes
@proj_types
def test_as_published(shape, proj_type):
    """The package untouched, in fp32: after fifty steps the difference is rounding, below 3e-5 of the way gone."""
    start = parameter(shape, dtype=torch.float32).detach().clone()
    a, b = parameter(shape, dtype=torch.float32), parameter(shape, dtype=torch.float32)
    grads = gradients(shape, STEPS, dtype=torch.float32)
    ours, theirs = feed(subspan(a, proj_type), a, grads), feed(galore(b, proj_type), b, grads)
    assert (ours - theirs).norm() < 3e-5 * (theirs - start).norm()


def test_galores_parameter_groups_are_understood():
    """The groups of galore_torch's README run unchanged: those with a rank are projected, the others are not."""
    vector, matrix, other = parameter((7,)), parameter((48, 20)), parameter((20, 48))
    groups = [
        {"params": [vector, other]},
        {"params": [matrix], "rank": RANK, "update_proj_gap": 200, "scale": SCALE, "proj_type": "std"},
    ]
    optimizer = SubspaceAdamW(groups, lr=LR)
    assert optimizer.state[matrix]["exp_avg"].shape == (48, RANK)
    assert optimizer.state[other]["exp_avg"].shape == (20, 48)
    assert "basis" not in optimizer.state[other]


@pytest.mark.usefixtures("_exact_basis")
@shapes
@proj_types
@pytest.mark.parametrize("beta1", [None, 0.9])
def test_adafactor(shape, proj_type, beta1):
    """GaLoreAdafactor without relative step and parameter scaling, weight decay included, at a
    constant learning rate.
    """
    a, b = parameter(shape), parameter(shape)
    group = {"params": [b], "rank": RANK, "update_proj_gap": 1000, "scale": SCALE, "proj_type": proj_type}
    settings = {"relative_step": False, "scale_parameter": False, "warmup_init": False}
    theirs = galore_torch.GaLoreAdafactor([group], lr=LR, beta1=beta1, weight_decay=0.1, **settings)
    rule, parts = Adafactor(beta1=beta1 or 0.0), {"selector": Dominant(), "residual": Discard()}
    ours = SubspaceOptimizer(
        [a], LR, RANK, rule=rule, **parts, update_proj_gap=1000, scale=SCALE, proj_type=proj_type, weight_decay=0.1
    )
    for G in gradients(shape, STEPS):
        torch.testing.assert_close(feed(ours, a, [G]), feed(theirs, b, [G]), rtol=0, atol=1e-10)
