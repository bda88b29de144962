"""A fine-tuning run: what it learns, keeps, restores and reports."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.labelled import examples, write_jsonl
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

from subspan import recipes
from subspan.checkpoints import directory as checkpoints
from subspan.costs.state_costs import StateCosts
from subspan.training.config.resolve_finetuning import resolve_finetune, with_length
from subspan.training.config.settings import CheckpointConfig, FinetuneConfig, ScheduleConfig, SelectionConfig
from subspan.training.finetuning import Finetuning
from subspan.training.loop import RunDivergedError
from subspan.training.monitor.metrics import read_metrics
from subspan.training.signals import RunInterruptedError
from subspan.utils.errors import InputError

Make = Callable[..., FinetuneConfig]


def weights(run: Finetuning) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


NAMES = list(recipes.list_optimizers())
FAST = {name for name in NAMES if name.endswith("_adamw") or name.startswith("sara_")} | {"adamw", "adafactor", "sgd"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in NAMES])
def test_every_method_learns(name: str, small: Make) -> None:
    """The word that decides is found, and the state takes the bytes of the closed form."""
    lr = 0.1 if name.endswith("sgd") else 5e-3 if name.endswith("lion") else 2e-2
    period = 20 if name.startswith("flora") else 5  # each rotation into a Gaussian basis amplifies the momentum
    run = Finetuning(
        small(optimizer=name, steps=30, lr=lr, update_proj_gap=period, evaluation=SelectionConfig(every=30))
    )
    summary = run.run()
    losses = [row["loss"] for row in read_metrics(run.out) if "loss" in row]
    assert sum(losses[-4:]) < 0.75 * sum(losses[:4])
    assert summary.scores["accuracy"] > 0.8 > summary.majority == 0.5  # type: ignore[operator]
    held = StateCosts.of_recipe(name).bytes_held(run.optimizer.param_groups)
    assert summary.state_bytes == summary.state_bytes_formula == held["states"] + held["bases"]


@pytest.mark.parametrize(("model", "keys"), [("bert", "token_type_ids"), ("llama", "input_ids")])
def test_the_best_checkpoint_scores_what_is_reported(
    model: str, keys: str, small: Make, data: tuple[Path, Path], request: pytest.FixtureRequest
) -> None:
    """The checkpoint is loaded with transformers only, and scores one example at a time."""
    run = Finetuning(small(model=str(request.getfixturevalue(model)), steps=24, max_length=40))
    summary = run.run()
    place = Path(summary.best)
    assert place.name == f"step-{summary.best_step:06d}"
    loaded, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(place).eval(),
        AutoTokenizer.from_pretrained(place),
    )
    right, loss, rows = 0, 0.0, [json.loads(line) for line in data[1].read_text().splitlines()]
    for row in rows:
        inputs = tokenizer(row["text"], return_tensors="pt")
        assert keys in inputs
        logits = loaded(
            **{key: value for key, value in inputs.items() if key != "token_type_ids" or model == "bert"}
        ).logits[0]
        right += loaded.config.id2label[int(logits.argmax())] == row["label"]
        loss -= float(logits.detach().double().log_softmax(-1)[loaded.config.label2id[row["label"]]])
    assert right / len(rows) == summary.scores["accuracy"]
    assert loss / len(rows) == pytest.approx(summary.val_loss, rel=1e-4)
    scores = [row["accuracy"] for row in read_metrics(run.out) if "accuracy" in row]
    assert summary.scores["accuracy"] == max(scores)
    assert (
        summary.best_step
        == [row["step"] for row in read_metrics(run.out) if "accuracy" in row][scores.index(max(scores))]
    )


def test_the_best_is_kept_beside_the_newest(small: Make) -> None:
    """Without learning no later evaluation is better than the first."""
    run = Finetuning(small(lr=0.0, steps=24))
    summary = run.run()
    kept = [path.name for path in checkpoints.list_checkpoints(run.out / "checkpoints")]
    assert kept == ["step-000003", "step-000024"]
    assert (summary.best_step, summary.steps) == (3, 24)


def test_patience(small: Make) -> None:
    """The run stops after so many evaluations that were not better, and does not go on when it is continued."""
    config = small(lr=0.0, steps=60, evaluation=SelectionConfig(every=3, patience=2))
    run = Finetuning(config)
    summary = run.run()
    assert (summary.steps, summary.best_step) == (9, 3)
    again = Finetuning(replace(config, resume="auto")).run()
    assert replace(again, seconds=0) == replace(summary, seconds=0)
    longer = Finetuning(replace(config, resume="auto", evaluation=SelectionConfig(every=3, patience=4))).run()
    assert (longer.steps, longer.best_step) == (15, 3)


@pytest.mark.parametrize("name", ["sara_adamw", "golore_hybrid_adamw", "rso_adamw", "adamw"])
@pytest.mark.parametrize("stop", [4, 8])
def test_a_resumed_run_is_the_unbroken_one(name: str, stop: int, small: Make, tmp_path: Path) -> None:
    """The weights are equal bit for bit, with dropout, in the same directory or in another. The best checkpoint comes
    along.
    """
    every = CheckpointConfig(every=4, keep=9)
    whole = Finetuning(small(optimizer=name, out=str(tmp_path / "whole"), checkpoint=every))
    expected = whole.run()
    checkpoint = tmp_path / "whole" / "checkpoints" / f"step-{stop:06d}"
    resumed = Finetuning(small(optimizer=name, out=str(tmp_path / "resumed"), resume=str(checkpoint)))
    found = resumed.run()
    assert same(weights(whole), weights(resumed))
    assert (found.scores, found.best_step, found.val_loss) == (expected.scores, expected.best_step, expected.val_loss)
    assert found.saved_activation_bytes == expected.saved_activation_bytes
    best = Path(found.best)
    assert best.parent.parent == tmp_path / "resumed"
    assert (best / "model.safetensors").read_bytes() == (Path(expected.best) / "model.safetensors").read_bytes()


def test_an_evaluation_that_a_signal_prevented_is_made_up_for(
    small: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A signal comes at a step that ends in an evaluation. The run stops at once, and the continued run evaluates that
    step first.
    """
    whole = Finetuning(small(out=str(tmp_path / "whole"))).run()
    run = Finetuning(small())
    monkeypatch.setattr(run, "_signal", lambda: 15 if run.step == 6 else 0)
    with pytest.raises(RunInterruptedError, match=r"subspan finetune --config .*--resume auto"):
        run.run()
    assert [row["step"] for row in read_metrics(run.out) if "accuracy" in row] == [3]
    continued = Finetuning(small(resume="auto"))
    assert continued.step == 6
    summary = continued.run()
    judged = [
        [(row["step"], row["accuracy"]) for row in read_metrics(out) if "accuracy" in row]
        for out in (run.out, Path(whole.out))
    ]
    assert judged[0] == judged[1]
    assert [step for step, _ in judged[0]] == [3, 6, 9, 12]
    assert (summary.best_step, summary.scores) == (whole.best_step, whole.scores)


def test_the_same_seed_gives_the_same_bits(small: Make, tmp_path: Path) -> None:
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run = Finetuning(small(out=str(tmp_path / name), seed=seed))
        run.run()
        found.append(weights(run))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


def test_accumulation_changes_nothing_but_rounding(small: Make, tmp_path: Path) -> None:
    """This holds also where parts of a batch are padded to other lengths.

    The optimizer is SGD, because Adam turns rounding into steps where the gradient is zero, as in the biases of
    attention's keys.
    """
    found = []
    for micro in (8, 2):
        run = Finetuning(
            small(optimizer="sgd", out=str(tmp_path / str(micro)), micro_batch_size=micro, steps=6, lr=0.05)
        )
        first = weights(run)
        for module in run.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        run.run()
        found.append(weights(run))
    for name, p in found[0].items():
        torch.testing.assert_close(found[1][name], p, rtol=0, atol=1e-6)
    assert max(float((found[0][name] - p).abs().max()) for name, p in first.items()) > 1e-2


def test_a_number_is_learnt(small: Make, tmp_path: Path) -> None:
    """The number is how often a word occurs in two texts together. Both correlations are reported, and the first one
    chooses.
    """
    rows = [
        {"a": row["text"] + " good" * (i % 4), "b": "good stone", "n": 1.0 + i % 4}
        for i, row in enumerate(examples(64, 0))
    ]
    rows = [row | {"a": str(row["a"]).replace("good", "lamp", 1) if i % 2 else row["a"]} for i, row in enumerate(rows)]
    path = write_jsonl(tmp_path / "numbers.jsonl", rows)
    columns = {"text_column": "a", "pair_column": "b", "label_column": "n"}
    summary = Finetuning(small(task="regression", data=str(path), validation_data=None, steps=60, **columns)).run()
    assert list(summary.scores) == ["pearson", "spearman"]
    assert summary.scores["pearson"] > 0.5
    assert summary.majority is None


def test_a_glue_task_of_local_files(small: Make, tmp_path: Path) -> None:
    """The task's columns, scores and order of labels are used, without the hub."""
    rows = [
        {"sentence1": row["text"], "sentence2": "so", "label": int(row["label"] == "pos")} for row in examples(48, 0)
    ]
    summary = Finetuning(
        small(task="mrpc", data=str(write_jsonl(tmp_path / "m.jsonl", rows)), validation_data=None)
    ).run()
    assert list(summary.scores) == ["accuracy", "f1"]
    report = summary.as_json()
    assert report["metric"] == "accuracy"
    assert report["f1"] == summary.scores["f1"]


def test_a_causal_model_learns_to_answer(small: Make, llama: Path, tmp_path: Path) -> None:
    """Its loss is the loss of the answers' tokens only, given the prompts that stand before them."""
    rows = [{"text": f"{row['text']} ", "label": row["label"]} for row in examples(48, 0)]
    held = [{"text": f"{row['text']} ", "label": row["label"]} for row in examples(8, 1)]
    files = {
        "data": str(write_jsonl(tmp_path / "a.jsonl", rows)),
        "validation_data": str(write_jsonl(tmp_path / "b.jsonl", held)),
    }
    run = Finetuning(small(task="lm", model=str(llama), steps=40, max_length=100, **files))
    summary = run.run()
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(summary.best).double().eval(),
        AutoTokenizer.from_pretrained(summary.best),
    )
    total, count = 0.0, 0
    for row in held:
        prompt = [tokenizer.eos_token_id, *tokenizer(row["text"])["input_ids"]]
        answer = [*tokenizer(row["label"])["input_ids"], tokenizer.eos_token_id]
        logits = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        total -= sum(float(logits[len(prompt) - 1 + i, token].detach()) for i, token in enumerate(answer))
        count += len(answer)
    assert summary.val_loss == pytest.approx(total / count, rel=1e-4)
    assert summary.scores == {"val_ppl": pytest.approx(math.exp(total / count), rel=1e-4)}
    assert summary.val_loss < 0.5 * math.log(257)
    steps = [(row["val_loss"], row["step"]) for row in read_metrics(run.out) if "val_loss" in row]
    assert summary.best_step == min(steps)[1]


def test_saved_activations_shrink_on_the_backward_side(small: Make) -> None:
    """The model is the same, and its layers save projections instead of inputs."""
    whole, less = (
        Finetuning(small(optimizer="sara_adamw", backward_side=side, out=None, rank=2, steps=3))
        for side in (False, True)
    )
    for run in (whole, less):
        run._train_step()
        run._train_step()
    assert less.saved_bytes < whole.saved_bytes  # type: ignore[operator]


def test_a_rank_that_compresses_nothing_is_said(small: Make, capsys: pytest.CaptureFixture[str]) -> None:
    Finetuning(small(rank=16)).run()
    assert "rank=16: reaches the shorter side of 7 matrices, which are trained at full rank" in capsys.readouterr().err


def test_papers_settings_of_a_model_with_weights_and_pretrainings_of_one_without(small: Make, tmp_path: Path) -> None:
    open_settings = dict.fromkeys(("lr", "scale", "rank", "update_proj_gap"))

    def found(examples: int = 48, **settings: object) -> tuple[float, float | None, int, int]:
        config = with_length(resolve_finetune(small(**open_settings | settings)), examples)
        return config.lr, config.scale, config.rank, config.update_proj_gap

    assert found(optimizer="golore_hybrid_adamw", steps=5000) == (3e-5, 4.0, 4, 500)
    assert found(optimizer="sara_adamw", model="llama-nano") == (0.01, 0.25, 16, 50)
    LlamaConfig().save_pretrained(tmp_path / "bare")
    bare = found(optimizer="sara_adamw", model=str(tmp_path / "bare" / "config.json"), tokenizer="bytes")
    assert bare == (0.01, 0.25, 128, 200)  # what pretraining takes for it
    epochs = Finetuning(small(steps=None, epochs=2, batch_size=10)).config
    assert epochs.steps == math.ceil(2 * 48 / 10)


@pytest.mark.parametrize(("steps", "period"), [(3, 1), (375, 37), (4999, 499), (6878, 500)])
def test_a_short_run_chooses_several_bases(steps: int, period: int, small: Make) -> None:
    """This is so with a model's own weights if no period is set. The period found is written down and stays."""
    found = with_length(resolve_finetune(small(update_proj_gap=None, steps=None, epochs=1, batch_size=1)), steps)
    assert (found.steps, found.update_proj_gap) == (steps, period)
    assert with_length(found, steps) == found
    assert with_length(resolve_finetune(small(steps=9, update_proj_gap=7)), 48).update_proj_gap == 7
    with pytest.raises(InputError, match="update_proj_gap=0: expected a whole number >= 1"):
        resolve_finetune(small(update_proj_gap=0))


def test_a_warmup_of_a_run_whose_length_the_examples_decide(small: Make) -> None:
    """The 48 examples in batches of 16, seen twice, are six steps, and two of them are warmup."""
    run = Finetuning(small(steps=None, epochs=2, batch_size=16, lr=0.01, schedule=ScheduleConfig("linear", 2, 0.0)))
    assert (run.config.steps, run.config.schedule.warmup_steps) == (6, 2)
    run.run()
    rates = [row["lr"] for row in read_metrics(run.out) if "lr" in row]
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.01 * 2 / 3, 0.01 / 3, 0.0])


def test_divergence_stops_the_run(small: Make) -> None:
    with pytest.raises(RunDivergedError, match="the run diverged"):
        Finetuning(small(optimizer="sgd", lr=1e30, clip=None, schedule=ScheduleConfig(warmup_steps=0))).run()


def test_lora(small: Make, data: tuple[Path, Path]) -> None:
    """Adapters and the head train, and the rest stands still. The merged model is a plain one that scores the same."""
    pytest.importorskip("peft")
    config = small(optimizer="adamw", steps=40, lr=3e-2)
    config = replace(config, lora=replace(config.lora, rank=4))
    run = Finetuning(config)
    before = weights(run)
    summary = run.run()
    assert summary.scores["accuracy"] > 0.8
    changed = {name for name, p in run.model.named_parameters() if name in before and not torch.equal(p, before[name])}
    assert summary.trainable == sum(p.numel() for group in run.optimizer.param_groups for p in group["params"])
    assert summary.trainable == sum(p.numel() for name, p in before.items() if "lora_" in name or "classifier" in name)
    assert all("lora_" in name or "classifier" in name for name in changed)
    assert summary.state_bytes == summary.state_bytes_formula
    loaded, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(summary.best).eval(),
        AutoTokenizer.from_pretrained(summary.best),
    )
    rows = [json.loads(line) for line in data[1].read_text().splitlines()]
    said = [int(loaded(**tokenizer(row["text"], return_tensors="pt")).logits.argmax()) for row in rows]
    right = sum(loaded.config.id2label[label] == row["label"] for label, row in zip(said, rows, strict=True))
    assert right / len(rows) == summary.scores["accuracy"]


@pytest.mark.slow
def test_the_bundled_task(tmp_path: Path) -> None:
    """A model with random weights gets far above the most common label."""
    summary = Finetuning(FinetuneConfig(threads=1, device="cpu", out=str(tmp_path / "run"))).run()
    assert summary.majority == pytest.approx(1 / 3)
    assert summary.scores["accuracy"] > 0.75
