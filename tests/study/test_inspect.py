"""``subspan inspect``: from probes, from checkpoints alone, and what is refused."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from subspan.cli import main
from subspan.study.inspect import inspect
from subspan.training.checkpoint import load_part

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


def test_checkpoints_alone_say_the_same(dominant: Path, tmp_path: Path) -> None:
    """Checkpoints fall right before refreshes here, so adjacent ones hold adjacent bases."""
    shutil.copytree(dominant, tmp_path / "copy")
    (tmp_path / "copy/probes.jsonl").unlink()
    with_probes, without = inspect(dominant), inspect(tmp_path / "copy")
    assert without["source"] == "checkpoints"
    assert [layer["name"] for layer in without["layers"]] == [layer["name"] for layer in with_probes["layers"]]
    for a, b in zip(with_probes["layers"], without["layers"], strict=True):
        assert a["overlap_adjacent"] == pytest.approx(b["overlap_adjacent"], abs=1e-5)
        assert a["angles"] == pytest.approx(b["angles"], abs=0.05)


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
    assert by_name["model.layers.0.mlp.up_proj.weight"]["stable_rank"] == pytest.approx(float(s.square().sum()), rel=1e-3)
    p = s / s.sum()
    entropy = -float(sum(x * math.log(x) for x in p.tolist() if x > 0))
    assert by_name["model.layers.0.mlp.up_proj.weight"]["effective_rank"] == pytest.approx(math.exp(entropy), rel=1e-2)


def test_a_subspace_that_stands_still_is_frozen_since_then(dominant: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    row = {"kind": "subspace", "name": "a.q_proj.weight", "skipped": 0, "step_seconds": 1.0, "usual_seconds": 0.5}
    overlaps = [None, 0.95, 0.5, 0.91, 0.93, 0.97]
    steps = [row | {"step": i} | ({} if x is None else {"overlap": x, "angles": [0, 1, 2]}) for i, x in enumerate(overlaps)]
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
    assert {"name", "type", "overlap_adjacent", "overlap_anchor", "frozen_since", "captured"} <= found["layers"][0].keys()
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


def test_bases_are_those_of_the_optimizer(dominant: Path) -> None:
    """The names of the optimizer's state are parameter names."""
    saved = load_part(dominant / "checkpoints/step-000016", "optimizer")
    names = [name for group in saved["param_groups"] for name in group["param_names"]]
    assert "model.layers.0.self_attn.q_proj.weight" in names
