"""The experiments, compared with sums, closed forms and loops that share no code with them; their claims can fail."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from subspan import linalg
from subspan.cli import main
from subspan.selectors import Random
from subspan.theory import EXPERIMENTS, rso
from subspan.theory.momentum import Momentum
from subspan.theory.nonconvergence import METHODS, Gradients, Nonconvergence
from subspan.theory.projection_error import Exact, ProjectionError, successive_sampling
from subspan.theory.rso import SELECTORS, RsoUnbiased, solution


def run(capsys, *words):
    assert main(["theory", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# --- nonconvergence ---------------------------------------------------------------------------------------------------


def test_nonconvergence(capsys):
    """Only GaLore stays above the optimum of a smaller problem; where the noise is averaged it does not."""
    found = run(capsys, "nonconvergence", "--n", "6", "--r", "2", "--seed", "1", "--steps", "6000")
    assert found["holds"]
    assert all(claim["holds"] for claim in found["claims"])
    published = {"sgd", "galore", "golore", "golore_hybrid", "sara", "sara_floor"}
    sketched = {"galore_fixed", "galore_sketch", "galore_fixed_sketch", "galore_sketch_norms"}
    assert set(found["final"]) == set(METHODS) == published | sketched
    above = {name: value - found["optimum"] for name, value in found["final"].items()}
    for stuck in ("galore", "galore_fixed", "galore_sketch_norms"):
        assert above.pop(stuck) > 0.02 * found["noise_level"]
    assert all(-1e-9 < left < 0.02 * found["noise_level"] for left in above.values())
    assert found["variants"]["large_batch"]["final"]["galore"] - found["optimum"] < 0.02 * found["noise_level"]


def test_the_problem_is_the_papers():
    """Its optimum and a step of gradient descent, from the definition of f by autograd."""
    setting = Nonconvergence(n=5, r=2, seed=3, lr=0.3)
    A, B = torch.eye(5, dtype=torch.float64)[:3], torch.zeros(5, 5, dtype=torch.float64)
    B[:3, :3] = setting.target()

    def f(X):
        return 0.5 * (A @ X).square().sum() + (B * X).sum()

    assert f(-B).item() == pytest.approx(-0.5 * B.square().sum().item())
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):  # f is convex: what is a minimum nearby is one
        assert f(-B + 0.1 * torch.randn(5, 5, dtype=torch.float64, generator=generator)) >= f(-B) - 1e-12
    X = setting.start().requires_grad_()
    noise = Gradients("adversarial", 1)
    xi = next(noise.draws(setting, 1))
    assert torch.equal(xi.abs(), torch.diag(torch.tensor([0.0, 0, 0, 1, 1], dtype=torch.float64)))
    f(X).backward()
    step = X.detach() - 0.3 * (X.grad + xi)  # torch's momentum begins with the whole gradient
    assert setting.final("sgd", [noise], 1) == [pytest.approx(f(step).item(), rel=1e-12)]


def test_the_sketch_is_what_moves_the_rest(monkeypatch):
    """With a fixed basis the claim about the sketch fails if its directions are drawn only once."""
    setting, problems = Nonconvergence(n=8, r=2, seed=1), [Gradients("adversarial", 1)]
    optimum, level = -0.5 * float(setting.target().square().sum()), 3.0
    assert setting.final("galore_fixed_sketch", problems, 2000)[0] - optimum < 0.02 * level
    drawn = linalg.keyed_generator
    monkeypatch.setattr(linalg, "keyed_generator", lambda what, *key: drawn(what, *key[: 0 if what == "sketch" else 9]))
    assert setting.final("galore_fixed_sketch", problems, 2000)[0] - optimum > 0.02 * level


def test_a_sketch_that_would_diverge_is_not_claimed_to_arrive():
    """The step outside has (n - r) / s times the mean square of the gradient, so large rates are not for it."""
    claims = {lr: str(Nonconvergence(n=9, r=1, lr=lr, steps=1).run()["claims"]) for lr in (0.2, 0.3)}
    assert "galore_sketch reaches" in claims[0.2]
    assert "galore_sketch reaches" not in claims[0.3]
    assert "galore_sketch_norms reaches" not in claims[0.2]


def test_claims_can_fail(capsys):
    """After a single step nobody has arrived."""
    assert main(["theory", "nonconvergence", "--steps", "1"]) == 0
    shown = capsys.readouterr().out
    assert "FAILS  sara reaches the optimum" in shown
    assert all(method in shown for method in METHODS)


# --- projection error -------------------------------------------------------------------------------------------------


def test_successive_sampling():
    weights = [0.5, 0.3, 0.15, 0.05]
    assert successive_sampling(weights, 1) == {frozenset({i}): pytest.approx(w) for i, w in enumerate(weights)}
    pairs = successive_sampling(weights, 2)
    for i, j in itertools.combinations(range(4), 2):
        a, b = weights[i], weights[j]
        assert pairs[frozenset({i, j})] == pytest.approx(a * b / (1 - a) + b * a / (1 - b))
    assert sum(successive_sampling(weights, 3).values()) == pytest.approx(1)
    assert sum(Exact.of(weights, [1.0] * 4, 3).included) == pytest.approx(3)
    alike = successive_sampling([1.0, 0.0, 0.0], 2)
    assert alike == {frozenset({0, 1}): pytest.approx(0.5), frozenset({0, 2}): pytest.approx(0.5)}


def test_projection_error(capsys):
    found = run(capsys, "projection-error", "--n", "6", "--r", "2", "--draws", "4000")
    assert found["holds"]
    assert len(found["claims"]) == 7
    flat = next(row for row in found["rows"] if row["spectrum"] == "1/i^0" and row["selector"] == "sara")
    assert flat["delta_exact"] == pytest.approx(2 / 6)
    assert flat["error"] == pytest.approx(1 - 2 / 6)
    bare, floored = ([row["delta_exact"] for row in found["rows"] if row["floor"] == floor] for floor in (0.0, 0.1))
    assert bare[-1] == 0 < 0.1 / 6 <= min(floored)


def test_wrong_probabilities_are_seen(monkeypatch):
    """If the weights were the squares of those that SARA draws with, the experiment would say so."""
    assert ProjectionError(n=5, r=2, draws=2000).run()["holds"]
    enumerated = Exact.of
    monkeypatch.setattr(Exact, "of", lambda weights, squares, r: enumerated([w * w for w in weights], squares, r))
    assert not ProjectionError(n=5, r=2, draws=2000).run()["holds"]


# --- momentum ---------------------------------------------------------------------------------------------------------


def test_momentum_of_a_basis_that_stays():
    """If the gradient stays, the momentum has 1 - 0.9^t of it in the dominant subspace and nothing outside."""
    setting = Momentum(n=6, r=2, m=8, sigma=0.0, turn=10**9, steps=5)
    sigma = torch.linalg.svdvals(setting._unit(linalg.keyed_generator("momentum", 0))).square()
    inside = float(sigma[:2].sum() / sigma.sum())
    expected = sum(1 - inside + inside * 0.81**t for t in range(1, 6)) / 5
    for transfer in ("keep", "rotate", "moments", "reset"):
        assert setting.error("dominant", transfer, 100) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("transfer", ["rotate", "reset"])
def test_momentum_against_a_loop(transfer):
    """Rotate and reset do not depend on the signs of singular vectors, so a loop with another SVD says the same."""
    setting, period = Momentum(n=6, r=2, m=8, turn=40, steps=30), 7
    generator = linalg.keyed_generator("momentum", 0)
    A, B = setting._unit(generator), setting._unit(generator)
    M, Q, total = torch.zeros(8, 2, dtype=torch.float64), None, 0.0
    for step in range(30):
        true = math.cos(2 * math.pi * step / 40) * A + math.sin(2 * math.pi * step / 40) * B
        G = true + torch.randn(8, 6, generator=generator, dtype=torch.float64) * (0.5 / 48**0.5)
        if step % period == 0:
            new = torch.linalg.svd(G).Vh[:2].mT
            M = M @ Q.mT @ new if Q is not None and transfer == "rotate" else torch.zeros_like(M)
            Q = new
        M = 0.9 * M + 0.1 * G @ Q
        total += float((M @ Q.mT - true).square().sum() / true.square().sum())
    assert setting.error("dominant", transfer, period) == pytest.approx(total / 30, rel=1e-8)


def test_momentum(capsys):
    sizes = ["--n", "8", "--r", "2", "--m", "8"]
    found = run(capsys, "momentum", "--steps", "1000", "--turn", "2000", "--periods", "[20,50]", *sizes)
    assert len(found["rows"]) == 12
    assert len(found["claims"]) == 14
    assert found["holds"]
    assert found["settings"]["steps"] == 1000
    rows = {(row["selector"], row["transfer"]): row["period 20"] for row in found["rows"]}
    assert rows["dominant", "rotate"] < rows["dominant", "keep"]


# --- RSO --------------------------------------------------------------------------------------------------------------


def test_rso(capsys):
    """Solved exactly, f falls where the subproblem is convex, whatever eta; gradient steps of the same size diverge."""
    found = run(capsys, "rso-unbiased", "--n", "6", "--r", "2", "--m", "6", "--draws", "4000", "--steps", "100")
    assert found["holds"]
    rows = {row["c"]: row for row in found["rows"]}
    assert min(rows) == 0.01 < max(rows) == 1e6
    assert all(row["convex"] < 0 and row["uneven"] < 0 for row in rows.values())
    assert [row["convex_gradient_step"] < 0 for row in rows.values()] == [c < 2 for c in rows]
    assert [row["concave_curvature"] for row in rows.values()] == [pytest.approx(1 - c) for c in rows]
    assert [row["concave"] is not None and row["concave"] > 0 for row in rows.values()] == [c < 1 for c in rows]


@pytest.mark.parametrize("c", [0.25, 0.9, 4.0])
@pytest.mark.parametrize("problem", ["convex", "uneven", "concave"])
def test_the_solution_is_a_minimum(problem, c):
    """By autograd, from its definition, the subproblem is flat at the solution and higher around, or has no floor."""
    setting = RsoUnbiased(n=6, r=2, m=6)
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(6, 2, generator=generator, dtype=torch.float64)).Q * 3**0.5
    h = {"convex": [4.0] * 6, "uneven": [1 + 0.6 * j for j in range(6)], "concave": [-4.0] * 6}[problem]
    eta = c / (4 * 3)

    def g(B):
        moved = X + B @ Q.T
        return sum(0.5 * h[j] * moved[:, j].square().sum() for j in range(6)) + B.square().sum() / (2 * eta)

    B, smallest = solution(X, setting.curvatures(problem), Q, eta)
    assert setting.eta(c) == pytest.approx(eta)
    hessian = torch.autograd.functional.hessian(lambda b: g(b.view(6, 2)), torch.zeros(12, dtype=torch.float64))
    assert smallest == pytest.approx(torch.linalg.eigvalsh(hessian)[0].item())
    if problem == "concave" and c > 1:
        assert B is None
        assert g(1e6 * X @ Q) < g(1e3 * X @ Q) < g(X @ Q) < 0
        return
    point = B.clone().requires_grad_()
    g(point).backward()
    assert point.grad.abs().max() < 1e-12
    for _ in range(8):
        near = B + 0.1 * torch.randn(6, 2, generator=generator, dtype=torch.float64)
        assert g(B) < g(near)
    assert g(B) < g(torch.zeros_like(B))


@pytest.mark.parametrize(
    ("problem", "solver", "c", "k"),
    [
        ("convex", "exact", 0.5, 1 / 1.5),
        ("convex", "exact", 1e6, 1 / (1 + 1e6)),
        ("concave", "exact", 0.5, 2.0),
        ("convex", "gradient_step", 0.5, 0.5),
        ("convex", "gradient_step", 4.0, -3.0),
    ],
)
def test_trajectories_have_their_closed_form(problem, solver, c, k):
    """Inside each subspace X is multiplied by k, outside it stays: a loop with projectors, and their expectation."""
    setting = RsoUnbiased(n=6, r=2, m=6, steps=1000)
    X, bases = setting.start(), setting.bases()
    ratios = []
    for Q in bases:
        U = torch.linalg.svd(Q, full_matrices=False).U
        moved = X + (k - 1) * X @ U @ U.T
        ratios.append((moved.square().sum() / X.square().sum()).item())
        X = moved / moved.norm()
    found = setting.trajectory(problem, solver, c, bases)
    assert found.rate == pytest.approx(sum(map(math.log, ratios)) / 1000, rel=1e-8)
    assert found.largest == pytest.approx(1 - min(ratios) if problem == "concave" else max(ratios) - 1)
    expected = 1 + 2 / 6 * (k**2 - 1)
    assert abs(sum(ratios) / 1000 - expected) < 5 * torch.tensor(ratios).std().item() / 1000**0.5


def test_the_library_solves_the_subproblem():
    """Gradient descent shrinks the error by 1 - (1 - c) / (1 + c) a step, and grows it so where there is no minimum."""
    setting = RsoUnbiased(n=6, r=2, m=6)
    assert setting.descent("concave", 0.9)[0] == pytest.approx((2 * 0.9 / 1.9) ** 200, rel=1e-3)
    assert setting.descent("convex", 1e6)[0] < 1e-12
    # B is X's part in the subspace, times c/(c - 1) of the factor to the 200, less one.
    away = [setting.descent("concave", c)[1] * (c - 1) / c / ((2 * c / (1 + c)) ** 200 - 1) for c in (1.1, 2.0, 4.0)]
    assert away == [pytest.approx(away[0])] * 3


def test_a_bias_is_seen(monkeypatch):
    """The mean of projectors without a scale is r/n I."""
    monkeypatch.setitem(SELECTORS, "haar", Random())
    assert RsoUnbiased(n=6, r=2, m=6, draws=1000).bias(SELECTORS["haar"])[1] > 0.5
    assert not RsoUnbiased(n=6, r=2, m=6, draws=1000, steps=5).run()["holds"]


def test_a_gradient_step_in_place_of_the_solution_is_seen(monkeypatch):
    """If eta were the size of a gradient step, the claims on solutions and on the library's step would fail."""
    exact = rso.solution
    monkeypatch.setattr(rso, "solution", lambda X, h, Q, eta: (-eta * (X * h) @ Q, exact(X, h, Q, eta)[1]))
    claims = RsoUnbiased(n=6, r=2, m=6, draws=1000, steps=50).run()["claims"]
    failed = [claim["claim"].split(",")[0].split(":")[0] for claim in claims if not claim["holds"]]
    assert failed == ["convex", "uneven", "concave", "200 steps of the library with eta"]


def test_the_page_shows_what_the_command_finds():
    """The table of RSO's subproblem on the page has the command's rows."""
    page = (Path(__file__).parents[2] / "docs" / "theory.md").read_text().partition("## RSO's two conditions")[2]
    page = page.partition("\n## ")[0]
    shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    shown = [cells for cells in shown if cells[0][0].isdigit()]
    rows = RsoUnbiased(draws=100).run()["rows"]
    assert len(shown) == len(rows)
    names = ["c", "convex", "uneven", "concave", "convex_gradient_step"]
    for cells, row in zip(shown, rows, strict=True):
        for cell, name in zip(cells, names, strict=True):
            assert (float(cell) if cell != "no minimum" else None) == pytest.approx(row[name], abs=6e-4), (cells, name)


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["nonconvergence", "--n", "4", "--r", "4"], "r=4: expected a whole number from 1 to 3, below n=4"),
        (["nonconvergence", "--lr", "2.5"], "lr=2.5: expected a number above 0 and below 2"),
        (["nonconvergence", "--batch", "0"], "batch=0: expected a whole number >= 1"),
        (["projection-error", "--floor", "2"], "floor=2.0: expected a share above 0 and at most 1"),
        (["momentum", "--periods", "[20, 20]"], "periods=(20, 20): expected two whole numbers >= 1, the shorter first"),
        (["rso-unbiased", "--draws", "3"], "draws=3: expected a whole number >= 100"),
        (["rso"], "rso-unbiased"),
    ],
)
def test_refusals(words, error, capsys):
    with pytest.raises(SystemExit) as status:
        main(["theory", *words])
    assert status.value.code == 2
    assert error in capsys.readouterr().err


def test_every_experiment_says_what_it_claims():
    assert all((experiment.__doc__ or "").strip().endswith((").", ").\n")) for experiment in EXPERIMENTS.values())
