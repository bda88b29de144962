"""A pretraining run: what it computes, writes and restores."""

import contextlib
import json
import math
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from subspan import recipes
from subspan.checkpoints import directory as checkpoints
from subspan.costs.state_costs import StateCosts
from subspan.training.config.settings import CheckpointConfig, PretrainConfig, ScheduleConfig
from subspan.training.data.tokenizer import load_tokenizer
from subspan.training.evaluation import evaluate, token_losses
from subspan.training.lr_schedule import lr_factor
from subspan.training.models.build import build_model
from subspan.training.monitor.metrics import read_metrics
from subspan.training.pretraining import Pretraining, RunDivergedError
from subspan.training.signals import RunInterruptedError

Make = Callable[..., PretrainConfig]


def final_weights(config: PretrainConfig) -> dict[str, torch.Tensor]:
    run = Pretraining(config)
    run.run()
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


NAMES = list(recipes.list_optimizers())
FAST = {name for name in NAMES if name.endswith("_adamw") or name.startswith("sara_")} | {"adamw", "adafactor", "sgd"}
"""Every method once, and every rule once; ``tests/unchanged`` trains all names, and the contract all pairs of parts."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in NAMES])
def test_every_method_learns(name: str, small: Make, tmp_path: Path) -> None:
    """The loss falls well below that of an untrained model, and the summary agrees with what was written."""
    period = 20 if name.startswith("flora") else 5  # each rotation into a Gaussian basis amplifies the momentum
    often = {"evaluation": replace(small().evaluation, every=20), "checkpoint": CheckpointConfig(every=20)}
    run = Pretraining(small(optimizer=name, steps=40, update_proj_gap=period, **often))
    summary = run.run()
    rows = read_metrics(tmp_path / "run")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[0] == pytest.approx(math.log(257), abs=0.2)
    assert losses[-1] < losses[0] - 1.5
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 41))
    assert [row["step"] for row in rows if "val_loss" in row] == [20, 40]
    assert (summary.steps, summary.tokens, summary.optimizer) == (40, 40 * 4 * 16, name)
    held = StateCosts.of_recipe(name).bytes_held(run.optimizer.param_groups)
    assert summary.state_bytes == held["states"] + held["bases"]
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
    """The weights are equal bit for bit from a checkpoint between refreshes, and the metrics show no seam."""
    every = CheckpointConfig(every=4, keep=9)
    whole = final_weights(small(optimizer=name, out=str(tmp_path / "whole"), checkpoint=every))
    checkpoint = tmp_path / "whole" / "checkpoints" / f"step-{stop:06d}"
    resumed = final_weights(small(optimizer=name, out=str(tmp_path / "resumed"), resume=str(checkpoint)))
    assert same(whole, resumed)
    keep = ("step", "loss", "val_loss", "lr", "grad_norm", "tokens")
    rows = [[{k: row.get(k) for k in keep} for row in read_metrics(tmp_path / out)] for out in ("whole", "resumed")]
    assert [row for row in rows[0] if row["step"] > stop] == rows[1]


@pytest.mark.parametrize("backward_side", [False, True])
def test_ranks_by_share_and_by_pattern_resume_exactly(backward_side: bool, small: Make, tmp_path: Path) -> None:
    """They are written down as they were given, and the file repeats the run."""
    ranks = {"rank": 0.25, "rank_pattern": {"q_proj": 8, "mlp": 0.125}, "backward_side": backward_side}
    every = CheckpointConfig(every=4, keep=9)
    whole = final_weights(small(out=str(tmp_path / "whole"), checkpoint=every, **ranks))
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-000008"
    assert same(whole, final_weights(small(out=str(tmp_path / "resumed"), resume=str(checkpoint), **ranks)))
    written = yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())
    assert {key: written[key] for key in ranks} == ranks


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
    """The logged norm is the norm before clipping. Adam's first step hides the clip, but its moments show it."""
    run = Pretraining(small(optimizer="adamw", clip=1e-3, steps=1))
    run.run()
    moments = torch.cat([state["exp_avg"].flatten() for state in run.optimizer.state.values()])
    assert float(moments.norm()) == pytest.approx(0.1 * 1e-3, rel=1e-3)  # (1 - beta1) * clipped gradient
    assert read_metrics(tmp_path / "run")[0]["grad_norm"] > 0.1


def test_lr_schedule() -> None:
    """The factor rises in a line to the end of warmup, then falls by half a cosine to the floor at the last step."""
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


def stopped(run: Pretraining, step: int) -> Pretraining:
    """``run``, which gets SIGTERM in this step."""
    read, count = run.data.next_batch, iter(range(run.step + 1, 10**6))

    def next_batch(size: int) -> object:
        if next(count) == step:
            signal.raise_signal(signal.SIGTERM)
        return read(size)

    run.data.next_batch = next_batch  # type: ignore[method-assign]
    return run


@pytest.mark.parametrize("backward_side", [False, True])
def test_a_run_that_is_stopped_as_it_diverges_saves_nothing(backward_side: bool, small: Make, tmp_path: Path) -> None:
    """The loss of the step is still finite, the weights after it are not. The checkpoint before stands."""
    calm = small(optimizer="sara_adamw", backward_side=backward_side, schedule=ScheduleConfig(warmup_steps=0))
    with pytest.raises(RunInterruptedError):
        stopped(Pretraining(calm), 3).run()
    run = stopped(Pretraining(replace(calm, resume="auto")), 5)
    step = run.optimizer.step

    def wild() -> None:
        for group in run.optimizer.param_groups:
            group["lr"] = 1e300 if run.step == 4 else group["lr"]
        step()

    run.optimizer.step = wild  # type: ignore[method-assign, assignment]
    with pytest.raises(
        RunDivergedError, match=r"weights that are not finite at step 5: the run diverged; try a lower --lr"
    ):
        run.run()
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path / "run/checkpoints")] == [
        "step-000003",
        "step-000004",
    ]
    again = Pretraining(replace(calm, resume="auto"))
    assert again.step == 4
    assert all(p.isfinite().all() for p in again.model.parameters())
    assert again.run().steps == 12


def test_a_run_that_diverges_in_its_first_step_leaves_no_checkpoint(small: Make, tmp_path: Path) -> None:
    with pytest.raises(RunDivergedError, match=r"weights that are not finite at step 1"):
        stopped(Pretraining(small(lr=1e300)), 1).run()
    assert not (tmp_path / "run" / "checkpoints").exists()


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


def test_bf16_leaves_the_rotary_frequencies_alone(small: Make, tmp_path: Path) -> None:
    """A checkpoint loads the model that was trained: the loss is the same, and buffers are in fp32."""
    run = Pretraining(small(precision="bf16"))
    assert all(b.dtype == torch.float32 for b in run.model.buffers())
    summary = run.run()
    newest = checkpoints.list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    again = AutoModelForCausalLM.from_pretrained(newest, dtype=torch.bfloat16)
    assert evaluate(again, run.data.validation(), 4, contextlib.nullcontext()) == summary.val_loss


def test_dropout_is_on_and_resumes_exactly(small: Make, tmp_path: Path) -> None:
    """A model from a directory trains in training mode, and its random numbers continue where they were."""
    model = build_model("llama-nano", load_tokenizer("bytes"), 16, seed=0)
    model.config.attention_dropout = 0.3
    model.save_pretrained(tmp_path / "model")
    settings = {"model": str(tmp_path / "model"), "tokenizer": "bytes"}
    run = Pretraining(small(**settings, out=str(tmp_path / "a")))
    assert run.model.training
    batch = run.data.next_batch(4)
    assert token_losses(run.model, batch) != token_losses(run.model, batch)
    whole = final_weights(small(**settings, out=str(tmp_path / "b")))
    step = str(tmp_path / "b" / "checkpoints" / "step-000008")
    assert same(whole, final_weights(small(**settings, out=str(tmp_path / "c"), resume=step)))


def test_seconds_go_on_after_a_resume(small: Make, tmp_path: Path) -> None:
    """The time of a run is the time of all its parts."""
    Pretraining(small()).run()
    halfway = tmp_path / "run" / "checkpoints" / "step-000008"
    again = Pretraining(small(resume=str(halfway), out=str(tmp_path / "again")))
    before = again.seconds
    assert 0 < before < again.run().seconds
