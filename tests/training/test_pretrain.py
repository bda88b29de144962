"""The run itself: what it computes, writes and restores."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from subspan import recipes
from subspan.training import checkpoint as checkpoints
from subspan.training.config import CheckpointConfig, OptimConfig, PretrainConfig
from subspan.training.errors import InputError
from subspan.training.metrics import read_metrics
from subspan.training.pretrain import Pretraining, RunDivergedError
from subspan.training.schedule import lr_factor

Make = Callable[..., PretrainConfig]


def final_weights(config: PretrainConfig) -> dict[str, torch.Tensor]:
    run = Pretraining(config)
    run.run()
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", recipes.list_optimizers())
def test_every_method_learns(name: str, small: Make, tmp_path: Path) -> None:
    """The loss falls well below that of an untrained model, and the summary agrees with what was written."""
    summary = Pretraining(small(optimizer=name, steps=40, evaluation=replace(small().evaluation, every=20))).run()
    rows = read_metrics(tmp_path / "run")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[0] == pytest.approx(math.log(257), abs=0.2)
    assert losses[-1] < losses[0] - 1.5
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 41))
    assert [row["step"] for row in rows if "val_loss" in row] == [20, 40]
    assert (summary.steps, summary.tokens, summary.optimizer) == (40, 40 * 4 * 16, name)
    assert summary.val_loss == rows[-1]["val_loss"]
    assert summary.val_ppl == pytest.approx(math.exp(summary.val_loss))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["val_loss"] == summary.val_loss


def test_checkpoints_are_hugging_face_models(small: Make, tmp_path: Path) -> None:
    run = Pretraining(small())
    run.run()
    saved = checkpoints.list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in saved] == ["step-000008", "step-000012"]
    model = AutoModelForCausalLM.from_pretrained(saved[-1], dtype=torch.float32)
    assert same(dict(run.model.named_parameters()), dict(model.named_parameters()))
    assert AutoTokenizer.from_pretrained(saved[-1])("abc")["input_ids"] == [97, 98, 99]


def test_the_same_seed_gives_the_same_bits(small: Make, tmp_path: Path) -> None:
    first, second, other = (
        final_weights(small(out=str(tmp_path / name), seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert same(first, second)
    assert not same(first, other)


@pytest.mark.parametrize("name", ["sara_adamw", "fira_sara_adamw", "golore_hybrid_adamw", "adamw"])
@pytest.mark.parametrize("stop", [4, 8])
def test_a_resumed_run_is_the_unbroken_one(name: str, stop: int, small: Make, tmp_path: Path) -> None:
    """Bit for bit, from a checkpoint between refreshes, with metrics that show no seam."""
    every = CheckpointConfig(every=4, keep=9)
    whole = final_weights(small(optimizer=name, out=str(tmp_path / "whole"), checkpoint=every))
    checkpoint = tmp_path / "whole" / "checkpoints" / f"step-{stop:06d}"
    resumed = final_weights(small(optimizer=name, out=str(tmp_path / "resumed"), resume=str(checkpoint)))
    assert same(whole, resumed)
    keep = ("step", "loss", "val_loss", "lr", "grad_norm", "tokens")
    rows = [[{k: row.get(k) for k in keep} for row in read_metrics(tmp_path / out)] for out in ("whole", "resumed")]
    assert [row for row in rows[0] if row["step"] > stop] == rows[1]


def test_metrics_after_a_resume_show_each_step_once(small: Make, tmp_path: Path) -> None:
    Pretraining(small()).run()
    for path in checkpoints.list_checkpoints(tmp_path / "run" / "checkpoints")[1:]:
        path.rename(tmp_path / "gone")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "lo')  # cut short by a kill
    Pretraining(small(resume="auto")).run()
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "loss" in row] == list(range(1, 13))


def test_a_finished_run_resumes_to_its_summary(small: Make) -> None:
    first = Pretraining(small()).run()
    again = Pretraining(small(resume="auto")).run()
    assert (again.steps, again.tokens, again.val_loss) == (first.steps, first.tokens, first.val_loss)


@pytest.mark.parametrize("micro", [1, 2])
def test_accumulation_changes_nothing_but_rounding(micro: int, small: Make, tmp_path: Path) -> None:
    whole = final_weights(small(optimizer="adamw", out=str(tmp_path / "whole")))
    parts = final_weights(small(optimizer="adamw", out=str(tmp_path / "parts"), micro_batch_size=micro))
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=2e-4)


def test_clipping(small: Make, tmp_path: Path) -> None:
    """The logged norm is that before clipping. With SGD-like first steps hidden by Adam, the moments show the clip."""
    run = Pretraining(small(optimizer="adamw", clip=1e-3, steps=1))
    run.run()
    moments = torch.cat([state["exp_avg"].flatten() for state in run.optimizer.state.values()])
    assert float(moments.norm()) == pytest.approx(0.1 * 1e-3, rel=1e-3)  # (1 - beta1) * clipped gradient
    assert read_metrics(tmp_path / "run")[0]["grad_norm"] > 0.1


def test_lr_schedule() -> None:
    """Linear to the peak at the end of warmup, half a cosine to the floor at the last step."""
    factors = [lr_factor(t, 100, 10, 0.1) for t in range(100)]
    assert factors[:10] == pytest.approx([(t + 1) / 10 for t in range(10)])
    assert factors[10] == 1.0
    assert factors[-1] == pytest.approx(0.1)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert lr_factor(10 + (99 - 10) / 2, 100, 10, 0.1) == pytest.approx(0.55)  # type: ignore[arg-type]
    assert lr_factor(0, 1, 0, 0.1) == 1.0


def test_logged_lr_is_the_one_used(small: Make, tmp_path: Path) -> None:
    Pretraining(small(lr=0.5, optimizer="adamw", steps=10)).run()
    used = [row["lr"] for row in read_metrics(tmp_path / "run") if "lr" in row]
    assert used == pytest.approx([0.5 * lr_factor(t, 10, 1, 0.1) for t in range(10)])


def test_divergence_stops_the_run(small: Make) -> None:
    with pytest.raises(RunDivergedError, match=r"loss (nan|inf) at step \d+.*lower --lr"):
        Pretraining(small(optimizer="adamw", lr=1e30, schedule=replace(small().schedule, warmup_steps=0))).run()


def test_bf16_weights_train_and_resume(small: Make, tmp_path: Path) -> None:
    whole = final_weights(small(precision="bf16", out=str(tmp_path / "a")))
    step = tmp_path / "a" / "checkpoints" / "step-000008"
    assert all(p.dtype == torch.bfloat16 for p in whole.values())
    assert same(whole, final_weights(small(precision="bf16", out=str(tmp_path / "b"), resume=str(step))))


def test_autocast_and_gradient_checkpointing_run(small: Make) -> None:
    summary = Pretraining(small(precision="bf16-mixed", gradient_checkpointing=True)).run()
    assert summary.val_loss < math.log(257)


def test_tensorboard(small: Make, tmp_path: Path) -> None:
    Pretraining(small(tensorboard=True, steps=2)).run()
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


def test_the_written_config_repeats_the_run(small: Make, tmp_path: Path) -> None:
    Pretraining(small()).run()
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert settings["lr"] == 0.01
    assert settings["schedule"]["warmup_steps"] == 1
    assert settings["tokenizer"] == "bytes"


# --- refusals: each before anything is written ---


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rank": 0}, "rank=0: expected a whole number >= 1"),
        ({"optimizer": "sara_adm"}, "optimizer 'sara_adm' is unknown; did you mean sara_adamw"),
        ({"model": "llama-mini"}, "model 'llama-mini' is unknown; did you mean llama-"),
        ({"data": "no/such/file.txt"}, "data 'no/such/file.txt': no such file"),
        ({"sequence_length": 10**6}, "sequence_length=1000000: the train half of the data holds"),
        ({"steps": 0}, "steps=0: expected a whole number >= 1"),
        ({"micro_batch_size": 3}, "micro_batch_size=3: expected a divisor of batch_size=4"),
        ({"clip": 0.0}, "clip=0.0: expected a number > 0"),
        ({"lr": -1.0}, "lr=-1.0: expected a number >= 0"),
        ({"packing": False}, "packing=False: only streamed data"),
        ({"optim": OptimConfig(selector={"powr": 2})}, "selector setting 'powr': Importance has power, floor, method"),
        ({"optim": OptimConfig(proj_type="up")}, "proj_type='up': expected one of std"),
        ({"optim": OptimConfig(targets=["nothing"])}, "targets: 'nothing' matches no matrix"),
        ({"resume": "no/such/checkpoint"}, "resume='no/such/checkpoint': no checkpoint there"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(overrides: dict, message: str, small: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Pretraining(small(**overrides))
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten(small: Make, tmp_path: Path) -> None:
    Pretraining(small()).run()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"out=.* holds a run already; continue it with --resume auto"):
        Pretraining(small())
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"optimizer": "galore_adamw"}, "optimizer was sara_adamw, is galore_adamw"),
        ({"rank": 8}, "rank was 4, is 8"),
        ({"model": "llama-tiny", "tokenizer": "bytes"}, "model was llama-nano, is llama-tiny"),
        ({"steps": 99}, "steps was 12, is 99"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(overrides: dict, message: str, small: Make, tmp_path: Path) -> None:
    Pretraining(small()).run()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=message):
        Pretraining(small(resume="auto", **overrides))
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_default_directories(small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A taken name gets a number; resume finds the newest run with the same settings."""
    monkeypatch.chdir(tmp_path)
    first = Pretraining(small(out=None))
    first.run()
    assert first.out == Path("runs/llama-nano-sara_adamw-seed0")
    second = Pretraining(small(out=None, rank=8))
    assert second.out == Path("runs/llama-nano-sara_adamw-seed0-2")
    second.run()
    assert Pretraining(small(out=None, resume="auto")).out == first.out
    assert Pretraining(small(out=None, resume="auto", rank=2)).step == 0


# --- checkpoints ---


def test_a_save_that_is_cut_short_leaves_the_last_checkpoint(
    small: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Pretraining(small())
    saves = torch.save

    def fails_at_eight(part: dict, path: Path) -> None:
        if part.get("step") == 8:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        saves(part, path)

    monkeypatch.setattr(torch, "save", fails_at_eight)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    monkeypatch.undo()
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in checkpoints.list_checkpoints(folder)] == ["step-000004"]
    resumed = Pretraining(small(resume="auto"))
    assert resumed.step == 4
    resumed.run()
    assert not (folder / "unfinished").exists()


def test_a_damaged_checkpoint_is_named(small: Make, tmp_path: Path) -> None:
    Pretraining(small()).run()
    newest = checkpoints.list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    (newest / "optimizer.pt").write_bytes(b"damaged")
    with pytest.raises(InputError, match=rf"{newest.name}: optimizer.pt cannot be read"):
        Pretraining(small(resume="auto"))


def test_seconds_go_on_after_a_resume(small: Make, tmp_path: Path) -> None:
    """The time of a run is that of all its parts."""
    Pretraining(small()).run()
    halfway = tmp_path / "run" / "checkpoints" / "step-000008"
    again = Pretraining(small(resume=str(halfway), out=str(tmp_path / "again")))
    before = again.seconds
    assert 0 < before < again.run().seconds
