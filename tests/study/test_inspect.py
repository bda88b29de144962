"""``subspan inspect``: from probes, from nothing but checkpoints, and what is refused."""

import json
import math
from pathlib import Path

import pytest
import torch

from subspan.checkpoints.directory import load_part
from subspan.cli import main
from subspan.study.inspect import _bases, inspect

pytestmark = pytest.mark.xdist_group("inspected runs")  # they share a run
FLAGS = ["--steps=16", "--batch_size=4", "--sequence_length=32", "--rank=4", "--update_proj_gap=4", "--threads=1",
         "--device=cpu", "--evaluation.tokens=64", "--checkpoint.every=4", "--checkpoint.keep=9"]  # fmt: skip


def train(out: Path, *more: str) -> Path:
    assert main(["pretrain", "--model=llama-nano", f"--out={out}", *FLAGS, *more]) == 0
    return out


@pytest.fixture(scope="module")
def dominant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "dominant", "--optimizer=galore_adamw", "--probes.subspace=true")


def test_importance_overlaps_less_than_dominant(dominant: Path, tmp_path: Path) -> None:
    importance = train(tmp_path / "importance", "--optimizer=sara_adamw", "--probes.subspace=true")
    first, second = inspect(dominant), inspect(importance)
    assert len(first["layers"]) == 28
    for kind, row in first["types"].items():
        assert second["types"][kind]["overlap_adjacent"] < row["overlap_adjacent"]
    assert all(layer["refreshes"] == 4 for layer in first["layers"])
    assert all(math.isfinite(layer["captured"]) for layer in first["layers"])


@pytest.mark.parametrize("every", [1, 3, 4])
def test_checkpoints_alone_say_the_same(every: int, dominant: Path, tmp_path: Path) -> None:
    """If every period has a checkpoint, there are as many bases as refreshes, however many checkpoints hold each."""
    train(tmp_path / "bare", "--optimizer=galore_adamw", f"--checkpoint.every={every}", "--checkpoint.keep=99")
    with_probes, without = inspect(dominant), inspect(tmp_path / "bare")
    assert without["source"] == "checkpoints"
    assert [layer["name"] for layer in without["layers"]] == [layer["name"] for layer in with_probes["layers"]]
    for a, b in zip(with_probes["layers"], without["layers"], strict=True):
        assert (a["refreshes"], a["steps_apart"]) == (b["refreshes"], b["steps_apart"]) == (4, 4)
        assert [step for step, _ in a["overlaps"]] == [step for step, _ in b["overlaps"]] == [5, 9, 13]
        assert a["overlap_adjacent"] == pytest.approx(b["overlap_adjacent"], abs=1e-5)
        assert a["angles"] == pytest.approx(b["angles"], abs=0.05)


def test_bases_that_are_no_neighbours_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Checkpoints at 8 and 16 hold the bases of steps 5 and 13; those at 15 and 16 hold only one, so no overlap."""
    far = train(tmp_path / "far", "--optimizer=galore_adamw", "--checkpoint.every=8")
    assert all((layer["refreshes"], layer["steps_apart"]) == (2, 8) for layer in inspect(far)["layers"])
    near = train(tmp_path / "near", "--optimizer=galore_adamw", "--checkpoint.every=15")
    assert all(layer["overlap_adjacent"] is None for layer in inspect(near)["layers"])
    capsys.readouterr()
    assert main(["inspect", str(far)]) == 0
    assert "chosen 8 steps apart" in capsys.readouterr().out
    assert main(["inspect", str(near)]) == 0
    assert "of which each subspace has one" in capsys.readouterr().out


def test_a_basis_that_moves_at_every_step_is_compared_in_every_checkpoint(tmp_path: Path) -> None:
    moving = train(tmp_path / "moving", "--optimizer=online_pca_adamw")
    for layer in inspect(moving)["layers"]:
        assert [step for step, _ in layer["overlaps"]] == [8, 12, 16]
        assert layer["steps_apart"] == 4
        assert 0 < layer["overlap_adjacent"] < 1


def test_the_update_between_two_checkpoints(dominant: Path) -> None:
    """One period of GaLore moves a weight inside one subspace: its change has the rank of that."""
    found = inspect(dominant, 4, 8)["update"]
    assert (found["from"], found["to"]) == (4, 8)
    by_name = {layer["name"]: layer for layer in found["layers"]}
    sigma = by_name["model.layers.0.mlp.up_proj.weight"]["singular_values"]
    assert sigma[0] == 1
    assert sigma[3] > 1e-3
    assert max(sigma[4:]) < 1e-4
    assert by_name["model.layers.0.mlp.up_proj.weight"]["effective_rank"] <= 4.01
    s = torch.tensor(sigma, dtype=torch.float64)
    assert by_name["model.layers.0.mlp.up_proj.weight"]["stable_rank"] == pytest.approx(
        float(s.square().sum()), rel=1e-3
    )
    p = s / s.sum()
    entropy = -float(sum(x * math.log(x) for x in p.tolist() if x > 0))
    assert by_name["model.layers.0.mlp.up_proj.weight"]["effective_rank"] == pytest.approx(math.exp(entropy), rel=1e-2)


def test_a_subspace_that_stands_still_is_frozen_since_then(dominant: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    row = {"kind": "subspace", "name": "a.q_proj.weight", "skipped": 0, "step_seconds": 1.0, "usual_seconds": 0.5}
    overlaps = [None, 0.95, 0.5, 0.91, 0.93, 0.97]
    steps = [
        row | {"step": i} | ({} if x is None else {"overlap": x, "angles": [0, 1, 2]}) for i, x in enumerate(overlaps)
    ]
    (tmp_path / "probes.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (layer,) = inspect(tmp_path)["layers"]
    assert layer["frozen_since"] == 3
    assert layer["refresh_step_seconds"] == 0.5
    assert layer["overlap_adjacent"] == pytest.approx(sum(x for x in overlaps if x) / 5)
    (tmp_path / "probes.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps[:5]))
    assert inspect(tmp_path)["layers"][0]["frozen_since"] is None  # twice is not to stand still


def test_the_command(dominant: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(dominant), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"layers", "types", "update"} <= found.keys()
    assert {"name", "type", "overlap_adjacent", "overlap_anchor", "frozen_since", "captured"} <= found["layers"][
        0
    ].keys()
    assert main(["inspect", str(dominant)]) == 0
    assert "q_proj" in capsys.readouterr().out


def test_what_is_wrong_is_named(dominant: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*arguments: str) -> str:
        with pytest.raises(SystemExit) as caught:
            main(["inspect", *arguments])
        assert caught.value.code == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err

    assert "holds no run" in fails(str(tmp_path / "nothing"))
    assert "step=5: run" in fails(str(dominant), "--begin", "5")
    lone = train(tmp_path / "lone", "--checkpoint.every=100")
    capsys.readouterr()
    assert "no probes.jsonl, and 1 checkpoint where two are needed" in fails(str(lone))
    (lone / "probes.jsonl").write_text('{"kind": "subspace", "name": "a", "step": 1}\n{"kind"\n{"kind": "noise"}\n')
    before = (lone / "probes.jsonl").read_bytes()
    assert "probes.jsonl:2: is no row of a probe" in fails(str(lone))
    assert (lone / "probes.jsonl").read_bytes() == before
    for line in (
        '{"kind": "noise", "name": "a", "step": 3}',
        '{"kind": "subspace", "name": "a", "step": 3, "overlap": "x"}',
        '{"kind": "subspace", "name": "a", "step": 3, "angles": [1.0]}',
        '{"kind": "subspace", "name": 1, "step": 3}',
        '{"kind": "other", "name": "a", "step": 3}',
        "[1]",
    ):
        (lone / "probes.jsonl").write_text(line + "\n")
        assert "probes.jsonl:1: is no row of a probe" in fails(str(lone)), line
    (lone / "probes.jsonl").unlink()
    for step in (4, 8):  # as ranks of fully_shard leave them
        (lone / f"checkpoints/step-{step:06d}").mkdir()
    assert "hold the parts of several ranks" in fails(str(lone))


def test_a_run_without_bases_has_the_change_of_its_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Full rank is what the spectra of the others are seen against."""
    full = train(tmp_path / "full", "--optimizer=adamw")
    found = inspect(full, 4, 16)
    assert (found["layers"], found["types"]) == ([], {})
    assert all(layer["effective_rank"] > 8 for layer in found["update"]["layers"] if layer["type"] == "q_proj")
    capsys.readouterr()
    assert main(["inspect", str(full)]) == 0
    out = capsys.readouterr().out
    assert "no basis to compare" in out
    assert "q_proj" in out


def test_bases_are_those_of_the_optimizer(dominant: Path) -> None:
    """Found by the names of its groups' parameters, in their order."""
    saved = load_part(dominant / "checkpoints/step-000016", "optimizer")
    (group,) = [group for group in saved["param_groups"] if "basis" in saved["state"][group["params"][0]]]
    step, Q = _bases(dominant / "checkpoints/step-000016")["model.layers.3.mlp.down_proj.weight"]
    number = group["params"][group["param_names"].index("model.layers.3.mlp.down_proj.weight")]
    kept = saved["state"][number]["basis"].double()
    assert step == 13
    torch.testing.assert_close(Q @ Q.mT, kept @ kept.mT, rtol=0, atol=1e-5)  # GaLore's basis is orthonormal
