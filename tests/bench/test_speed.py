"""The measurements of speed do what they say. No time is asserted.

What is timed is the real thing. Accuracy agrees with numpy and scipy, and intervals, floors and sums agree with
calculation by hand.
"""

import json
import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from torch.utils.flop_counter import FlopCounterMode

from subspan import linalg
from subspan.bench import grow, plot, refresh, speed, step, timing, together
from subspan.bench.grow import GrowSetting
from subspan.bench.peers import PEERS
from subspan.bench.refresh import RefreshSetting
from subspan.bench.setting import Setting
from subspan.bench.step import StepSetting
from subspan.bench.together import AllSetting
from subspan.cli import main

RATIO = {"median", "low", "high"}
TINY = {
    Setting: {"model": "llama-nano", "tokens": 64, "sequence_length": 64, "rank": 8},
    RefreshSetting: {"shapes": ("24x24", "16x40"), "pairs": 3, "training_steps": 0},
    StepSetting: {"model": "llama-nano", "layers": 1, "rank": 8, "pairs": 3, "peers": ("adamw_fused", "galore_torch")},
    GrowSetting: {"widths": (16, 32), "shares": (0.125, 0.5), "pairs": 3},
}
STEP = StepSetting(**TINY[StepSetting])


# --- rounds and intervals ---------------------------------------------------------------------------------------------


def test_contenders_take_turns():
    """Each contender is called once a round, and the order turns around.

    Rounds that warm up are not counted. Three rounds are left when the budget is spent.
    """
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = timing.rounds(contenders, 4, warm_up=2)
    assert "".join(calls) == "cbaabc" * 3
    assert {name: len(taken) for name, taken in seconds.items()} == dict.fromkeys("abc", 4)
    assert all(value > 0 for taken in seconds.values() for value in taken)
    assert len(timing.rounds(contenders, 50, budget=0.0)["a"]) == timing.FEWEST


def test_interval_is_scipys():
    """The bootstrap interval of the median of nine ratios is scipy's, and the mean over samples is geometric."""
    ours = np.array([3.0, 1.0, 4.0, 1.5, 9.0, 2.6, 5.3, 5.8, 9.7])
    theirs = np.array([2.0, 7.0, 1.8, 2.8, 1.8, 2.8, 4.5, 9.0, 4.5])
    found = timing.interval(timing.median_ratio, zip(ours, theirs, strict=True))
    expected = scipy.stats.bootstrap((ours / theirs,), np.median, method="percentile", n_resamples=20_000, rng=0)
    low, high = expected.confidence_interval
    assert found == pytest.approx({"median": np.median(ours / theirs), "low": low, "high": high})
    twice, eightfold = [(2.0, 1.0)] * 3, [(8.0, 1.0)] * 5
    assert timing.interval(timing.mean_of_ratios, twice, eightfold) == pytest.approx(dict.fromkeys(RATIO, 4.0))


def test_amortised_ratio_by_hand():
    """The ratio is ``(2 + (42 - 2) / 200) / (1 + (401 - 1) / 200)``."""
    ordinary, refreshes = [(2.0, 1.0)] * 3, [(42.0, 401.0)] * 3
    assert timing.interval(step._amortised_ratio, ordinary, refreshes)["median"] == pytest.approx(2.2 / 3)


# --- refresh ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("angle", [0.0, 1e-9, 0.3, math.pi / 2])
def test_accuracy_of_a_basis_that_is_off_by_a_known_angle(angle):
    """The last leading vector is turned towards the first of the other vectors; two singular values are changed."""
    G, r = refresh.matrix(30, 12, 1e3, seed=1).double(), 4
    _, sigma, Vh = (torch.from_numpy(part) for part in np.linalg.svd(G.numpy(), full_matrices=False))
    turned, changed = Vh.mT.clone(), sigma.clone()
    turned[:, r - 1] = math.cos(angle) * Vh[r - 1] + math.sin(angle) * Vh[r]
    changed[0] += 0.1
    found = refresh.accuracy(G, (changed, turned), (sigma, Vh.mT), r)
    assert found["largest_angle"] == pytest.approx(angle, abs=1e-12)
    lost = math.sin(angle) ** 2 * (sigma[r - 1] ** 2 - sigma[r] ** 2) / sigma[:r].square().sum()
    assert found["energy_lost"] == pytest.approx(float(lost), abs=1e-14)
    p, true_p = (values.numpy() / values.numpy().sum() for values in (changed, sigma))
    assert found["probability_distance"] == pytest.approx(np.abs(p - true_p).sum() / 2)
    assert found["probability_error"] == pytest.approx(np.abs(p / true_p - 1).max())


def test_gradients_have_the_spectrum_that_is_said():
    for m, n in ((20, 50), (50, 20), (20, 20)):
        sigma = np.linalg.svd(refresh.matrix(m, n, 1e3, seed=0).double().numpy(), compute_uv=False)
        np.testing.assert_allclose(sigma, np.geomspace(1, 1e-3, 20), rtol=1e-3)
    assert not torch.equal(refresh.matrix(20, 20, 10, seed=0), refresh.matrix(20, 20, 10, seed=1))


@pytest.mark.parametrize("shape", ["24x24", "16x40", "40x16"])
def test_refresh_columns_agree_with_numpy_and_scipy(shape):
    """The accuracy of the row is what numpy and scipy find for what the library returns."""
    found = refresh.measure(RefreshSetting(shapes=(shape,), condition=100.0, pairs=3, training_steps=0))
    (row,) = found["rows"]
    m, n = refresh.size(shape)
    weight = refresh.matrix(m, n, 100.0, 0)
    G = weight if m >= n else weight.mT
    _, true_sigma, true_Vh = np.linalg.svd(G.double().numpy(), full_matrices=False)
    for name, dtype in (("gram_fp64", torch.float64), ("gram_fp32", torch.float32)):
        sigma, V = linalg.right_singular(G, "gram", dtype)
        assert sigma.dtype == dtype
        angles = scipy.linalg.subspace_angles(V[:, : row["rank"]].double().numpy(), true_Vh[: row["rank"]].T)
        error = row["accuracy"][name]
        assert error["largest_angle"] == pytest.approx(angles.max(), rel=0.05, abs=1e-12)
        p, true_p = sigma.double().numpy() / sigma.double().numpy().sum(), true_sigma / true_sigma.sum()
        assert error["probability_error"] == pytest.approx(np.abs(p / true_p - 1).max(), rel=0.05, abs=1e-9)
    assert row["accuracy"]["gram_fp64"]["largest_angle"] < 1e-9
    assert 1e-9 < row["accuracy"]["gram_fp32"]["largest_angle"] < 1e-2
    assert set(found["ratio_vs_svd"]) == RATIO | {"shapes"}
    assert set(found["ratio_vs_svd"]["shapes"][shape]) == RATIO
    assert row["seconds"].keys() == {"refresh", "gram_fp32", "svd_fp32"}
    assert found["share_of_training"] is None


def test_share_of_training_by_hand():
    """LLaMA-60M has eight blocks of four square layers and three of the MLP.

    Without a shape or a time there is no share.
    """
    rows = [
        {"shape": shape, "seconds": {"refresh": s}} for shape, s in (("512x512", 0.25), ("512x1376", 0.5), ("64x64", 9))
    ]
    share = refresh._share(rows, 2.0)
    assert share["refresh_seconds"] == 8 * (4 * 0.25 + 3 * 0.5)
    assert share["share"] == pytest.approx(20 / 400)
    assert refresh._share(rows[1:], 2.0) is None
    assert refresh._share(rows, None) is None


# --- step -------------------------------------------------------------------------------------------------------------


def _bases(optimizer):
    """Copy the bases, ours or those of galore_torch."""
    states = optimizer.state.values()
    return [(state["basis"] if "basis" in state else state["projector"].ortho_matrix).clone() for state in states]


def test_ordinary_steps_keep_the_bases_and_refreshes_change_them():
    """What is timed as one kind of step is not the other kind, for our optimizers and for theirs."""
    model = step._layers_of(STEP)
    for gap, same in ((step._NEVER, True), (1, False)):
        for name, optimizer in step._optimizers(STEP, model, gap).items():
            if name == "adamw_fused":
                continue
            optimizer.step()
            before = _bases(optimizer)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
            after = _bases(optimizer)
            assert len(after) == 7
            assert all(torch.equal(a, b) == same for a, b in zip(before, after, strict=True)), name


def test_step_row_by_row():
    """Every optimizer has a row. FLOPs are those that torch counts. Fused AdamW holds nothing in addition."""
    found = step.measure(STEP)
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == [
        "sara_adamw",
        "galore_adamw",
        "fira_adamw",
        "adamw_fused",
        "galore_torch",
        "sara_adamw_backward",
    ]
    for key in ("ratio_vs_adamw_fused", "ratio_vs_galore_torch"):
        assert set(found[key]) == RATIO | {"shapes"}
        assert found[key]["shapes"]["matrices"] == {"64x64": 4, "172x64": 2, "64x172": 1}
    extra_keys = ("ordinary_ratio_vs_galore_torch", "refresh_ratio_vs_galore_torch", "backward_ratio_vs_adamw_fused")
    assert all(set(found[key]) == RATIO for key in extra_keys)
    assert "refresh_ratio_vs_adamw_fused" not in found
    weights = [*step._layers_of(STEP).parameters()]
    run = step._matmuls(weights, STEP.rank)
    with FlopCounterMode(display=False) as counter:
        run()
    assert found["matmul_flops"] == counter.get_total_flops()
    assert found["largest_weight_bytes"] == 4 * 64 * 172
    assert rows["adamw_fused"]["extra_weights"] == 0
    assert rows["adamw_fused"]["refresh_seconds"] is None
    # R and U (m, r) of the largest weight, which takes U Qᵀ in place; what a refresh holds in addition is in fp64.
    assert rows["sara_adamw"]["extra_weights"] == pytest.approx(2 * STEP.rank / 64, abs=0.01)
    assert rows["sara_adamw"]["refresh_extra_weights"] > 1
    sara = rows["sara_adamw"]
    mean = sara["ordinary_seconds"] + (sara["refresh_seconds"] - sara["ordinary_seconds"]) / 200
    assert sara["amortised_seconds"] == pytest.approx(mean)


def test_backward_side_steps_move_weights_by_low_rank():
    """The backward-side step that is timed is a real one: carriers have gradients, and the step changes the weights."""
    model, optimizer = step._backward_side(STEP)
    before = [layer.weight.detach().clone() for layer in model.values()]
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for group in optimizer.param_groups for p in group["params"]
    )
    optimizer.step()
    for layer, old in zip(model.values(), before, strict=True):
        sigma = torch.linalg.svdvals((layer.weight - old).double())
        assert sigma[STEP.rank - 1] > 100 * sigma[STEP.rank]


@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if peer.installed])
def test_every_installed_peer_steps(name):
    """A peer is built by its package's own interface and steps on all shapes. Where it says so, it has a subspace."""
    model = step._layers_of(STEP)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = PEERS[name].make([*model.parameters()], 8, 200)
    for _ in range(2):
        optimizer.step()
    assert all((p != old).any() and p.isfinite().all() for p, old in zip(model.parameters(), before, strict=True))
    held = sum(t.numel() for t in step._tensors_in(optimizer.state))
    full = 2 * sum(p.numel() for p in model.parameters())
    assert (held < full) == PEERS[name].refreshes


# --- growth -----------------------------------------------------------------------------------------------------------


def test_floors_and_slopes_by_hand():
    rates = {"matmul_fp32": 1e6, "matmul_fp64": 1e3, "copy": 1e9}
    assert grow.floors(16, 4, rates) == pytest.approx((4 * 256 * 4 / 1e6, 16 / 3 * 4096 / 1e3))
    # Three of the Gram matrix's four blocks, in fp32.
    assert grow.floors(512, 4, rates)[1] == pytest.approx((3 / 4 * 2 + 10 / 3) * 512**3 / 1e6)
    slow = rates | {"copy": 10.0}
    assert grow.floors(16, 4, slow) == pytest.approx((4 * (3 * 256 + 6 * 64) / 10, (12 * 256 + 4 * 64) / 10))
    assert grow.slope([(2, 5 * 2**3), (4, 5 * 4**3), (16, 5 * 16**3)]) == pytest.approx(3)
    assert grow.slope([(2, 1.0), (4, -1.0)]) is None


def test_grow_and_its_figure():
    """Each width and rank has a row. The figure names both, in greys that can be read on light and dark."""
    setting = GrowSetting(**TINY[GrowSetting])
    found = grow.measure(setting)
    assert [(row["width"], row["rank"]) for row in found["rows"]] == [(16, 2), (16, 8), (32, 4), (32, 16)]
    assert found["exponents"].keys() == {"step", "refresh"}
    assert found["exponents"]["step"].keys() == {"1/8", "1/2"}
    assert grow.measure(GrowSetting(widths=(16,), shares=(0.5,), pairs=3))["exponents"] is None
    for row in found["rows"]:
        row["refresh_seconds"] = 0.0  # noise may leave no time to choose
    svg = plot.growth(found)
    assert all(words in svg for words in ("<svg", "r/d = 1/8", "choosing a basis", "#808080"))
    assert "#000000" not in svg
    assert "#ffffff" not in svg


# --- all, and the command ---------------------------------------------------------------------------------------------


def test_all_quick(monkeypatch, capsys, tmp_path):
    """The promised keys are in what is printed and in the file, with the machine; and there is a text."""
    monkeypatch.setattr(together, "QUICK", TINY)
    monkeypatch.setattr(together, "QUICK_PAIRS", 3)
    assert main(["bench", "all", "--quick", "--json", "--out", str(tmp_path / "all.json")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "all.json").read_text())
    assert found["command"] == "subspan bench all --quick --json"
    assert found["made_by"]["torch"] == torch.__version__
    for key in (
        "refresh.ratio_vs_svd", "step.ratio_vs_galore_torch", "step.ratio_vs_adamw_fused", "train.ratio_vs_adamw_fused",
    ):  # fmt: skip
        assert set(found[key]) == RATIO | {"shapes"}
        assert 0 < found[key]["low"] <= found[key]["median"] <= found[key]["high"]
        name, _, ratio = key.partition(".")
        assert found[name][ratio]["median"] == found[key]["median"]
    assert found["quick"] is True
    assert "grow" not in found
    assert found["machine"]["versions"]["torch"] == torch.__version__
    assert found["machine"]["threads"] == torch.get_num_threads()
    words = speed.together(found)
    assert all(key in words for key in found if ".ratio" in key)
    assert torch.__version__ in words


def test_all_sets_refreshes_against_the_steps_that_it_timed(monkeypatch):
    """Without ``--quick``, ``refresh`` gets the time of a training step, growth is measured, and defaults stay."""
    seen = {}

    def stub(name, **found):
        def measure(setting, *rest):
            seen[name] = (setting, *rest)
            return found

        return measure

    times = {"sara_adamw": 3.0, "adamw_fused": 4.0}
    monkeypatch.setattr(together.train, "measure", stub("train", seconds=times, ratio_vs_adamw_fused={}, shapes={}))
    monkeypatch.setattr(together.refresh, "measure", stub("refresh", ratio_vs_svd={}))
    monkeypatch.setattr(together.step, "measure", stub("step", ratio_vs_adamw_fused={}))
    monkeypatch.setattr(together.grow, "measure", stub("grow", rows=[]))
    found = together.measure(AllSetting(), quick=False)
    assert seen["refresh"] == (RefreshSetting(), 4.0)
    assert seen["train"] == (Setting(), together.PAIRS)
    assert seen["step"] == (StepSetting(),)
    assert found["grow"] == {"rows": []}
    together.measure(AllSetting(seed=3), quick=True)
    assert seen["refresh"][1] is None
    assert seen["refresh"][0].shapes == ("512x512", "512x1376")
    assert seen["step"][0].seed == 3


def test_quick_leaves_what_the_user_sets():
    assert together.quickened(StepSetting(pairs=99)) == StepSetting(pairs=99, layers=1)
    assert together.quickened(AllSetting()) == AllSetting()


@pytest.mark.parametrize("what", ["refresh", "step", "grow"])
def test_commands(what, monkeypatch, capsys, tmp_path):
    """Each command prints text and writes JSON into a file, and the figure where there is one."""
    monkeypatch.setattr(together, "QUICK", TINY)
    drawing = ["--plot", str(tmp_path / "grow.svg")] if what == "grow" else []
    assert main(["bench", what, "--quick", "--out", str(tmp_path / "found.json"), *drawing]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert getattr(speed, what)(found) == out.rstrip("\n")
    assert all(row.get("shape", str(row.get("width", row.get("name")))) in out for row in found["rows"])
    assert all(len(line) < 140 for line in out.splitlines()[:-1])
    if drawing:
        assert (tmp_path / "grow.svg").read_text().rstrip().endswith("</svg>")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["refresh", "--shapes", '["512"]'], "shapes='512': expected rows x columns"),
        (["refresh", "--shapes", "[]"], "shapes=(): expected at least one"),
        (["refresh", "--rank", "512"], "rank=512: expected 1 to 511, below the shorter side of 512x512"),
        (["refresh", "--pairs", "2"], "pairs=2: expected a whole number >= 3"),
        (["refresh", "--condition", "0.5"], "condition=0.5: expected a number >= 1"),
        (["refresh", "--training-steps", "1"], "training_steps=1: expected 3 or more, or 0"),
        (["step", "--model", "llama-60n"], "llama-60m"),
        (["step", "--rank", "512"], "rank=512: expected 1 to 511"),
        (["step", "--peers", '["galore_torc"]'], "galore_torch"),
        (["step", "--layers", "0"], "layers=0: expected a whole number >= 1"),
        (["grow", "--widths", "[4]"], "widths=(4,): expected numbers of 8 or more"),
        (["grow", "--shares", "[1.5]"], "shares=(1.5,): expected ranks over widths"),
        (["all", "--threads", "0"], "threads=0: expected a whole number >= 1"),
        (["all", "--quick", "--plot", "grow.svg"], "quick=true: measures nothing on growth"),
        (["all", "--out", "nowhere/all.json"], "out='nowhere/all.json': nowhere is no directory"),
        (["grow", "--plot", "."], "plot='.': . is a directory"),
    ],
)
def test_refusals(words, error, capsys):
    with pytest.raises(SystemExit) as status:
        main(["bench", *words])
    assert status.value.code == 2
    assert error in capsys.readouterr().err


def test_a_peer_that_is_not_there(monkeypatch):
    """A peer that is not installed is left out and named. If it is asked for, the error says how to get it."""
    monkeypatch.setattr("subspan.bench.peers.find_spec", lambda module: None if module == "apollo_torch" else object())
    assert "apollo_torch" not in StepSetting().compared
    with pytest.raises(ValueError, match="peers='apollo_torch': is not installed; pip install apollo-torch"):
        StepSetting(peers=("apollo_torch",))
