"""The sketched residual against a slow version, its laws over many draws, and Fira as the case of all directions."""

import copy
import itertools
import math
import re

import pytest
import torch
from support.helpers import RANK, SHAPES, feed, gradients, matrix_of, oriented_side, parameter
from support.parsers import PARSER

from subspan import SubspaceAdamW, SubspaceOptimizer, create, project_backward
from subspan.factory import residual_of
from subspan.linalg import haar
from subspan.parts import Key
from subspan.residuals import Fira, Sketch
from subspan.residuals.draws import DRAWS
from subspan.rules import RULES
from subspan.selectors import Coordinates, Gaussian, Random, Switch
from subspan.utils.errors import SettingError

shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
draws = pytest.mark.parametrize("draw", DRAWS)
LR, GAP, STEPS, SCALE, DECAY = 1e-2, 5, 20, 0.25, 0.1
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


def uneven(shape, seed=0):
    """Gradients whose size rises and falls, so that the limiter acts at some steps and not at others."""
    return [G * (1 + 0.8 * (-1) ** (t // 3)) for t, G in enumerate(gradients(shape, STEPS, seed))]


def directions(residual, Q, step=0, name="weight"):
    """Draw the directions of a residual outside the basis ``Q``."""
    n, r = Q.shape
    like = torch.empty(n, residual.sketch_width(n, r), dtype=Q.dtype)
    return residual.sketch(like, r, lambda A: A - A @ Q @ Q.T, Key(0, name, step))


@draws
@pytest.mark.parametrize(("n", "r", "s"), [(12, 4, 3), (20, 4, 7), (20, 10, 10), (9, 1, 2)])
def test_the_mean_over_draws_is_what_lies_outside(draw, n, r, s):
    """Over 2,000 draws the mean of ``G O Oᵀ`` is ``G (I - Q Qᵀ)``, as nearly as its variance lets it be.

    The expectation of the squared error of the mean is the variance of one draw divided by their number. The error has
    the degrees of freedom of a symmetric matrix of ``n - r`` rows, at least 36, so three times the expectation is many
    deviations away. A bias of a tenth of the part outside is further still. For orthonormal directions the variance is
    known: ``((n - r) / s - 1)`` times the squared norm. For the others there is a bound.
    """
    count, Q = 2000, haar(torch.empty(n, r), torch.Generator().manual_seed(n))
    G = torch.randn(30, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    outside = G @ (torch.eye(n, dtype=torch.float64) - Q @ Q.T)
    mean, variance = torch.zeros_like(G), 0.0
    for step in range(count):
        O = directions(Sketch(s, draw=draw), Q, step)
        assert (Q.T @ O).abs().max() < 1e-12
        estimate = G @ O @ O.T
        mean += estimate / count
        variance += (estimate - outside).square().sum().item() / count
    if draw == "gaussian":
        known = ((n - r) / s - 1) * outside.square().sum().item()
        assert variance == pytest.approx(known, rel=0.05, abs=1e-18)
    assert variance < 1.05 * (n / s - 1) * outside.square().sum().item()
    assert (mean - outside).square().sum().item() < 3 * variance / count + 1e-18
    assert (0.1 * outside).square().sum().item() > 3 * variance / count + 1e-18


@pytest.mark.parametrize("axes", [False, True], ids=["any basis", "a basis of axes"])
@pytest.mark.parametrize("s", [1, 3, 6])
@pytest.mark.parametrize("draw", ["gaussian", "coordinates"])
def test_the_variance_is_that_of_the_theory_page(draw, s, axes):
    """The mean over 4,000 draws of ``||S O Oᵀ - S||²`` is its closed form, within five standard errors.

    With coordinates it depends on the columns of ``S``: one of them is made five times as large as the others.
    """
    n, r, count = 12, 4, 4000
    Q = torch.eye(n, r, dtype=torch.float64) if axes else haar(torch.empty(n, r), torch.Generator().manual_seed(0))
    G = torch.randn(5, n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    G[:, 3 if not axes else 7] *= 5
    S = G - G @ Q @ Q.T
    like = torch.empty(count, n, s, dtype=torch.float64)
    O = Sketch(s, draw=draw).sketch(like, r, lambda A: A - A @ Q @ Q.T, Key(0, "weight", 0))
    found = (S @ O @ O.mT - S).square().sum((-2, -1)) / S.square().sum()
    inside = float((S.square().sum(0) * Q.square().sum(1)).sum() / S.square().sum())
    known = {
        "gaussian": (n - r) / s - 1,
        "coordinates": n / s - 1 - n / s * (n - s) / (n - 1) * inside,
    }[draw]
    assert abs(found.mean().item() - known) < 5 * found.std().item() / count**0.5 + 1e-12
    assert known > 0.3 * ((n - r) / s - 1)  # so there is something to compare


@pytest.mark.parametrize("draw", ["coordinates", "cosines"])
def test_draws_without_a_factorisation(draw):
    """Without a basis to be outside of, the directions are ``s`` columns of an orthogonal matrix: the columns drawn as
    all of them are orthonormal, and other draws take others of them.
    """
    n = 11
    full = Key(0, "weight", 0)
    O = DRAWS[draw](torch.empty(n, n, dtype=torch.float64), 0, lambda A: A, torch.Generator().manual_seed(full.step))
    torch.testing.assert_close(O.T @ O, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    stack = DRAWS[draw](torch.empty(3, n, 4, dtype=torch.float64), 0, lambda A: A, torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        stack.mT @ stack, (n / 4) * torch.eye(4, dtype=torch.float64).expand(3, 4, 4), rtol=0, atol=1e-12
    )
    assert not torch.equal(stack[0], stack[1])


@draws
def test_a_draw_depends_on_the_key_and_the_basis(draw):
    """A key draws the same directions each time; another step or another name draws others."""
    Q = haar(torch.empty(12, 3), torch.Generator().manual_seed(0))
    residual = Sketch(4, draw=draw)
    before = torch.get_rng_state()
    first = directions(residual, Q)
    torch.rand(7)  # what else draws does not matter
    assert torch.equal(directions(residual, Q), first)
    torch.set_rng_state(before)
    directions(residual, Q)
    assert torch.equal(torch.get_rng_state(), before)
    for other in (directions(residual, Q, step=1), directions(residual, Q, name="another")):
        assert not torch.allclose(other @ other.T, first @ first.T, atol=1e-3)


class SlowSketch:
    """The equations of the docstring, row by row, for one weight whose columns are compressed."""

    def __init__(self, m, r, residual):
        self.M = self.V = torch.zeros(m, r, dtype=torch.float64)
        self.residual, self.previous, self.t, self.limited = residual, None, 0, 0

    def direction(self, G, Q):
        r, n = Q.shape[1], Q.shape[0]
        s = min(self.residual.width, n - r)
        R = G @ Q
        O = directions(self.residual, Q, self.t, "0.0")
        self.t += 1
        self.M = BETA1 * self.M + (1 - BETA1) * R
        self.V = BETA2 * self.V + (1 - BETA2) * R**2
        c1, c2 = 1 - BETA1**self.t, 1 - BETA2**self.t
        N = self.M / (self.V.sqrt() + EPS * c2**0.5)
        # Orthonormal directions, and the weight in front of them as the issue writes it.
        E = O / O.norm(dim=0)
        weight = {"unbiased": (n - r) / s, "root": ((n - r) / s) ** 0.5, "one": 1.0}[self.residual.weight]
        phi = [(N[i].norm() / R[i].norm()).item() if self.residual.factor else 1.0 for i in range(len(G))]
        S = torch.stack([phi[i] * weight * (G[i] @ E) for i in range(len(G))])
        limiter = self.residual.limiter
        if limiter is not None and self.previous is not None and S.norm() > limiter * self.previous:
            S, self.limited = S * limiter * self.previous / S.norm(), self.limited + 1
        self.previous = S.norm()
        return (SCALE * N @ Q.T + S @ E.T) * c2**0.5 / c1


@shapes
@pytest.mark.parametrize(
    "residual",
    [
        Sketch(3),
        Sketch(5, None),
        Sketch(3, limiter=None),
        Sketch(3, weight="root"),
        Sketch(2, weight="one", limiter=1.1),
    ],
    ids=repr,
)
def test_slow_version(shape, residual):
    """Twenty steps with four subspaces equal the slow version, which takes the basis from the state."""
    left = oriented_side(shape, "std") == "left"
    p = parameter(shape)
    W = p.detach().clone()
    optimizer = SubspaceAdamW(
        [p], LR, RANK, selector="dominant", residual=residual, update_proj_gap=GAP, scale=SCALE, weight_decay=DECAY,
        betas=(BETA1, BETA2), eps=EPS,
    )  # fmt: skip
    slow = SlowSketch(shape[1] if left else shape[0], RANK, residual)
    for G in uneven(shape):
        feed(optimizer, p, [G])
        D = slow.direction(G.T if left else G, optimizer.state[p]["basis"].clone())
        W = (1 - LR * DECAY) * W - LR * (D.T if left else D)
        torch.testing.assert_close(p.detach(), W, rtol=0, atol=1e-10)
    if residual.limiter is not None:
        assert 0 < slow.limited < STEPS - 1


@shapes
@draws
@pytest.mark.parametrize("limiter", [None, 1.01])
def test_all_directions_are_fira(shape, draw, limiter):
    """A width of all that is outside, or more, is Fira, however the directions are drawn."""
    moved = []
    for residual in (Fira(limiter=limiter), Sketch(1000, limiter=limiter, draw=draw)):
        p = parameter(shape)
        optimizer = SubspaceAdamW(
            [p], LR, RANK, selector="dominant", residual=residual, update_proj_gap=GAP, scale=SCALE
        )
        moved.append(feed(optimizer, p, uneven(shape)))
    torch.testing.assert_close(moved[0], moved[1], rtol=0, atol=1e-10)


@draws
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_update_has_no_part_inside_the_subspace(draw, dtype):
    """At scale 0 only the residual moves the weight, and the basis does not see it, also in lower precision."""
    p = parameter(SHAPES["tall"], dtype=dtype)
    optimizer = SubspaceAdamW([p], LR, RANK, selector="dominant", residual=Sketch(6, draw=draw), scale=0.0)
    for G in gradients(SHAPES["tall"], 4, dtype=dtype):
        p.detach().zero_()  # so that a change is rounded to its own precision
        change = feed(optimizer, p, [G]).double()
        inside = change @ optimizer.state[p]["basis"].double()
        assert change.norm() > 1e-2
        assert inside.norm() < 2 * torch.finfo(dtype).eps * change.norm()


def test_every_direction_is_reached_with_a_fixed_basis():
    """Gradients that point out of the first basis move the weight where a basis alone would leave it.

    There is no limiter, because the first gradient has no part outside from which one may grow.
    """
    shape, moved = SHAPES["tall"], {}
    first, second = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
    first[:, :RANK], second[:, RANK:] = gradients((shape[0], RANK), 1)[0], 1.0
    for residual in ("discard", Sketch(3, limiter=None)):
        p = parameter(shape)
        optimizer = SubspaceAdamW([p], LR, RANK, selector="dominant", residual=residual, update_proj_gap=10**6)
        feed(optimizer, p, [first])
        before = p.detach().clone()
        feed(optimizer, p, [first + second] * 20)
        moved[residual] = (p.detach() - before)[:, RANK:].norm().item()
    assert moved["discard"] < 1e-12
    assert moved[Sketch(3, limiter=None)] > 0.1


def test_stacks_have_directions_of_their_own():
    """Each matrix of a stack draws its own, and has its own limiter."""
    p = parameter((3, 12, 8))
    optimizer = SubspaceAdamW([p], LR, RANK, selector="dominant", residual=Sketch(2), scale=0.0)
    before = p.detach().clone()
    change = feed(optimizer, p, [torch.stack(gradients((12, 8), 1) * 3)]) - before
    assert optimizer.state[p]["residual_norm"].shape == (3,)
    for a, b in itertools.combinations(change, 2):
        assert (a - b).norm() > 0.1 * a.norm()
    assert all(torch.linalg.matrix_rank(one, rtol=1e-9) == 2 for one in change)


def test_resumed_bit_for_bit():
    """Nothing of a sketch is in the state, and a resumed run draws the same."""
    p, q = parameter(SHAPES["tall"]), parameter(SHAPES["tall"])
    optimizer, other = (SubspaceAdamW([x], LR, RANK, residual=Sketch(), update_proj_gap=GAP) for x in (p, q))
    grads = gradients(SHAPES["tall"], 12)
    feed(optimizer, p, grads[:7])
    saved = copy.deepcopy(optimizer.state_dict())
    plain = SubspaceAdamW([parameter(SHAPES["tall"])], LR, RANK).state_dict()
    assert saved["state"][0].keys() - plain["state"][0].keys() == {"residual_norm"}
    with torch.no_grad():
        q.copy_(p)
    other.load_state_dict(saved)
    assert torch.equal(feed(optimizer, p, grads[7:]), feed(other, q, grads[7:]))


def test_a_basis_of_coordinates():
    """A basis that is no matrix has an outside too."""
    (G,) = gradients(SHAPES["tall"], 1)
    p = parameter(SHAPES["tall"])
    before = p.detach().clone()
    optimizer = SubspaceAdamW(
        [p], LR, RANK, selector=Coordinates("top"), residual=Sketch(3, draw="coordinates"), scale=0.0
    )
    change = feed(optimizer, p, [G]) - before
    Q = matrix_of(Coordinates("top"), optimizer.state[p], SHAPES["tall"][1])
    assert not (change @ Q).any()
    assert change.any()


WIDTHS = [0, -1, -0.5, 1.0, 1.5, 10.0, True, False, math.nan, math.inf, "16", "wide", [16], (8,), {}, torch.tensor(3)]


@pytest.mark.parametrize("width", WIDTHS, ids=repr)
def test_what_is_no_width(width):
    """The error shows the value and everything that is allowed."""
    words = f"width={width!r}: expected a whole number of directions >= 1, a share of the columns above 0 and below 1"
    with pytest.raises(ValueError, match=re.escape(words)):
        Sketch(width)
    with pytest.raises(ValueError, match=re.escape(words)):
        create("sara_sketch_adamw", torch.nn.Linear(8, 6), rank=2, residual={"width": width})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"factor": "norm"}, "factor='norm': expected 'norms'.*or None"),
        ({"factor": False}, "factor=False"),
        ({"factor": []}, r"factor=\[\]"),
        ({"weight": "two"}, "weight='two': expected one of unbiased, root, one"),
        ({"weight": 1}, "weight=1"),
        ({"weight": []}, r"weight=\[\]: expected one of unbiased, root, one"),
        ({"limiter": 0.0}, r"limiter=0.0: expected a growth factor .*or None to turn it off"),
        ({"limiter": True}, "limiter=True"),
        ({"limiter": math.nan}, "limiter=nan"),
        ({"limiter": "1.01"}, "limiter='1.01'"),
        ({"draw": "cosine"}, r"draw='cosine': did you mean cosines\?"),
        ({"draw": None}, "draw=None"),
        ({"draw": ["gaussian"]}, r"draw=\['gaussian'\]"),
    ],
)
def test_settings_check_themselves(settings, words):
    """The error shows the bad value and what is allowed."""
    with pytest.raises(ValueError, match=words):
        Sketch(**settings)


@pytest.mark.parametrize("in_a_file", [False, True], ids=["flag", "file"])
@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{width: 8}", Sketch(8)),
        ("{width: 0.25, draw: cosines}", Sketch(0.25, draw="cosines")),
        ("{width: null, limiter: null, factor: null}", Sketch(limiter=None, factor=None)),
        ('{"name": "sketch", "width": 1}', Sketch(1)),
        ("{width: 0}", "width=0"),
        ("{width: true}", "width=True"),
        ("{width: -3}", "width=-3"),
        ("{width: .nan}", "width=nan"),
        ("{width: 1.0}", "width=1.0"),
        ("{width: wide}", "width='wide'"),
        ("{widht: 8}", r"residual setting 'widht'=8: Sketch has width, factor"),
        ("{name: scetch}", r"residual='scetch': did you mean sketch\?"),
    ],
)
def test_as_commands_and_files_write_it(written, expected, in_a_file, tmp_path):
    """``--optim.residual`` and a run file are read alike, and a wrong value is refused with the same words."""
    words = [f"--optim.residual={written}"]
    if in_a_file:
        (tmp_path / "run.yaml").write_text(f"optim:\n  residual: {written}\n")
        words = [f"--config={tmp_path / 'run.yaml'}"]
    given = PARSER.parse_args(["pretrain", *words]).pretrain.optim.residual
    if isinstance(expected, Sketch):
        assert residual_of("sara_sketch_adamw", given) == expected
    else:
        with pytest.raises(SettingError, match=expected):
            residual_of("sara_sketch_adamw", given)


@pytest.mark.parametrize("execution", ["optimizer", "backward"])
def test_too_wide_is_all_directions_and_is_said_once(execution, caplog):
    """More directions than there are outside means all of them, and one line says so for all matrices."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
    if execution == "backward":
        project_backward(model, rank=3, share="none", residual=Sketch(1000))
    with caplog.at_level("INFO"):
        create("sara_sketch_adamw", model, rank=3, residual=Sketch(1000))
    (said,) = [line for line in caplog.messages if "all that is outside" in line]
    assert "for 3 of the matrices" in said
    assert "there are only 5 directions" in said


@pytest.mark.parametrize(
    "selector", [Random(scaled=True), Gaussian(), Switch(Random(), Random(scaled=True), total_steps=10)], ids=repr
)
@pytest.mark.parametrize("execution", ["optimizer", "backward"])
def test_a_basis_that_is_not_orthonormal_is_refused(selector, execution):
    """There is no outside then."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 8))
    if execution == "backward":
        project_backward(model, rank=2, share="none", residual=Sketch())
    with pytest.raises(ValueError, match=r"residual=Sketch.*needs an orthonormal basis.*selectors.Random\(\)"):
        SubspaceAdamW(model.parameters(), rank=2, selector=selector, residual=Sketch())


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_has_a_step_to_compare_with(rule):
    """``||U_i|| / ||R_i||`` is finite and above 0 for each rule, also one that has no moments."""
    p = parameter(SHAPES["tall"])
    optimizer = SubspaceOptimizer(
        [p], 1e-2, RANK, selector=Random(), rule=RULES[rule](), residual=Sketch(3, limiter=None), scale=0.0
    )
    change = feed(optimizer, p, gradients(SHAPES["tall"], 3))
    assert change.isfinite().all()
    assert change.norm() > 1e-6


@pytest.mark.parametrize(
    ("width", "n", "r", "s"),
    [
        (None, 64, 16, 16),
        (None, 20, 14, 6),
        (8, 64, 16, 8),
        (0.25, 172, 16, 43),
        (0.25, 10, 4, 3),
        (0.9, 64, 16, 48),
        (0.001, 64, 16, 1),
    ],
)
def test_widths(width, n, r, s):
    """A share is one of the columns; there is at least one direction, and at most all."""
    assert Sketch(width).sketch_width(n, r) == s
