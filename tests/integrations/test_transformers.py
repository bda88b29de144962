"""The real ``Trainer`` with the tuple of the README: what it projects, which settings reach it, and exact resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.frameworks import PROJECTED, STEPS, projected
from torch.optim import Optimizer
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from subspan.integrations.transformers import Subspace
from subspan.utils.errors import SettingError


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 5,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(**given | settings)


def trainer(model: LlamaForCausalLM, text: Any, args: TrainingArguments, **settings: Any) -> Trainer:
    chosen = {"name": "sara_adamw", "rank": 4, "update_proj_gap": 4} | settings
    return Trainer(model=model, args=args, train_dataset=text, optimizer_cls_and_kwargs=(Subspace, chosen))


def optimizer_of(model: LlamaForCausalLM, text: Any, args: TrainingArguments, **settings: Any) -> Optimizer:
    return trainer(model, text, args, **settings).create_optimizer()


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "name", ["sara_adamw", "galore_adafactor", "fira_adamw", "golore_hybrid_adamw", "ldadam_adamw"]
)
def test_trains(llama: Any, text: Any, tmp_path: Path, name: str) -> None:
    """The loss falls, the named matrices move in subspaces, and the learning rate follows the Trainer's schedule."""
    run = trainer(llama(), text, arguments(tmp_path, warmup_steps=2), name=name)
    run.train()
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    rates = [row["learning_rate"] for row in run.state.log_history if "loss" in row]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 1
    assert max(rates) == pytest.approx(1e-2, rel=0.01)
    assert rates[-1] < 2e-3
    assert projected(run.optimizer.optimizer) == PROJECTED


def test_resume_is_exact(llama: Any, text: Any, tmp_path: Path) -> None:
    """A run that is stopped after ten of twelve steps and resumed ends with the bits of the unbroken run."""

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 10

    whole = trainer(llama(), text, arguments(tmp_path / "whole"))
    whole.train()
    first = trainer(llama(), text, arguments(tmp_path / "broken"))
    first.add_callback(Stop())
    first.train()
    assert any(not torch.equal(p, q) for p, q in zip(first.model.parameters(), whole.model.parameters(), strict=True))
    second = trainer(llama(), text, arguments(tmp_path / "broken"))
    second.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-10"))
    ended, expected = weights(second.model), weights(whole.model)
    assert all(torch.equal(ended[name], expected[name]) for name in expected)


def test_settings_of_the_trainer(llama: Any, text: Any, tmp_path: Path) -> None:
    """All of them are those of TrainingArguments: rates, betas, eps, weight decay and its split, seed, length."""
    args = arguments(
        tmp_path, learning_rate=3e-3, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, weight_decay=0.1, max_steps=50
    )
    model = llama()
    run = trainer(model, text, args, name="golore_hybrid_adamw")
    optimizer = run.create_optimizer()
    decayed = set(run.get_decay_parameter_names(model))
    assert optimizer.seed == 3
    assert optimizer.selector.total_steps == 50
    seen: set[str] = set()
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (3e-3, (0.8, 0.95), 1e-6)
        for name in group["param_names"]:
            assert group["weight_decay"] == (0.1 if name in decayed else 0.0), name
            seen.add(name)
    assert seen == {name for name, _ in model.named_parameters()}
    assert "model.embed_tokens.weight" in decayed
    assert "model.norm.weight" not in decayed


def test_the_trainers_split_is_by_name(llama: Any, text: Any, tmp_path: Path) -> None:
    """A matrix that the Trainer does not decay is not decayed, whatever its shape."""
    model = llama()
    model.model.layers[0].register_parameter("scale_norm", torch.nn.Parameter(torch.ones(3, 3)))
    optimizer = optimizer_of(model, text, arguments(tmp_path, weight_decay=0.1))
    decay = {n: group["weight_decay"] for group in optimizer.param_groups for n in group["param_names"]}
    assert decay["model.layers.0.scale_norm"] == 0.0
    assert decay["model.layers.0.mlp.up_proj.weight"] == 0.1


def test_a_recipe_keeps_its_own_betas_unless_they_are_changed(llama: Any, text: Any, tmp_path: Path) -> None:
    """Adam-mini's second beta is 0.95; TrainingArguments' default of 0.999 is nobody's choice."""
    untouched = optimizer_of(llama(), text, arguments(tmp_path), name="sara_adam_mini")
    assert untouched.param_groups[0]["betas"] == (0.9, 0.95)
    chosen = optimizer_of(llama(), text, arguments(tmp_path, adam_beta2=0.99), name="sara_adam_mini")
    assert chosen.param_groups[0]["betas"] == (0.9, 0.99)


def test_settings_of_the_tuple_win(llama: Any, text: Any, tmp_path: Path) -> None:
    optimizer = optimizer_of(llama(), text, arguments(tmp_path), lr=0.5, seed=9, weight_decay=0.2, targets=["q_proj"])
    assert (optimizer.seed, optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (9, 0.5, 0.2)
    assert projected(optimizer) == {name for name in PROJECTED if "q_proj" in name}


def test_ranks_by_share_and_by_pattern(llama: Any, text: Any, tmp_path: Path) -> None:
    optimizer = optimizer_of(llama(), text, arguments(tmp_path), rank=0.25, rank_pattern={"q_proj": 2})
    found = {group["rank"]: len(group["params"]) for group in optimizer.param_groups}
    assert found[2] == sum("q_proj" in name for name in PROJECTED)
    assert found[0.25] == len(PROJECTED) - found[2]


@pytest.mark.parametrize(
    ("chosen", "settings", "words"),
    [
        ({"name": "sara_adam"}, {}, "'sara_adam' is unknown; did you mean .*sara_adamw"),
        ({"name": "golore_hybrid_adamw"}, {"max_steps": -1, "num_train_epochs": 1}, "pass total_steps"),
        ({"rank": 0}, {}, "rank=0"),
    ],
)
def test_errors(llama: Any, text: Any, tmp_path: Path, chosen: Any, settings: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        optimizer_of(llama(), text, arguments(tmp_path, **settings), **chosen)


def test_settings_that_a_rule_lacks_are_said(
    llama: Any, text: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Adafactor means another thing by eps than Adam, and SGD has none: neither is set, and each is named."""
    for name in ("sara_sgd", "sara_adafactor"):
        caplog.clear()
        optimizer = optimizer_of(llama(), text, arguments(tmp_path, adam_beta1=0.8, adam_epsilon=1e-6), name=name)
        assert "adam_beta1 and adam_beta2 of TrainingArguments: not used by" in caplog.text
        assert "adam_epsilon of TrainingArguments: not used by" in caplog.text
        assert optimizer.param_groups[0].get("eps", 1e-30) == 1e-30


def test_a_version_that_hands_over_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="install transformers>=5"):
        Subspace([{"params": []}], name="sara_adamw")


def test_without_a_trainer(llama: Any, tmp_path: Path) -> None:
    """Called by hand it needs the arguments, and decays what the Trainer would."""
    with pytest.raises(SettingError, match=r"args=None: no Trainer is calling; pass its TrainingArguments"):
        Subspace()(llama(), "sara_adamw")
    optimizer = Subspace()(llama(), "sara_adamw", arguments(tmp_path, weight_decay=0.1), rank=4)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}


def test_arguments_in_the_tuple_need_no_caller(llama: Any, text: Any, tmp_path: Path) -> None:
    """The optimizer is the one that the Trainer's own arguments give: the same groups, names and settings."""
    args = arguments(tmp_path, weight_decay=0.1, adam_beta1=0.8, adam_epsilon=1e-6)
    found = []
    for settings in ({}, {"args": args}):
        model = llama()
        model.model.layers[0].register_parameter("scale_norm", torch.nn.Parameter(torch.ones(3, 3)))
        chosen = (Subspace, {"name": "golore_hybrid_adamw", "rank": 4, **settings})
        run = Trainer(model=model, args=args, train_dataset=text, optimizer_cls_and_kwargs=chosen)
        optimizer = run.create_optimizer()
        groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        found.append((groups, optimizer.seed, optimizer.selector))
    assert found[0] == found[1]
    decay = {name: group["weight_decay"] for group in found[0][0] for name in group["param_names"]}
    assert decay["model.layers.0.scale_norm"] == 0.0


def test_a_trainer_farther_up_is_not_taken(llama: Any, text: Any, tmp_path: Path) -> None:
    """Only the direct caller is asked: the arguments of another Trainer would be wrong without a word."""
    seen = []

    class Outer(Trainer):
        def create_optimizer(self, model: Any = None) -> Optimizer:
            with pytest.raises(SettingError, match="no Trainer is calling"):
                by_hand(self.model)
            seen.append(super().create_optimizer(model))
            return seen[0]

    def by_hand(model: torch.nn.Module) -> None:
        Subspace()(model, "sara_adamw")

    chosen = (Subspace, {"name": "sara_adamw", "rank": 4})
    run = Outer(model=llama(), args=arguments(tmp_path), train_dataset=text, optimizer_cls_and_kwargs=chosen)
    assert run.create_optimizer() is seen[0]
    assert seen[0].param_groups[0]["lr"] == 1e-2


def test_a_trainers_own_split_is_asked_for(llama: Any, text: Any, tmp_path: Path) -> None:
    """A Trainer may say by itself which parameters decay."""

    class Own(Trainer):
        def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
            return ["model.norm.weight"]

    chosen = (Subspace, {"name": "sara_adamw", "rank": 4})
    args = arguments(tmp_path, weight_decay=0.1)
    optimizer = Own(model=llama(), args=args, train_dataset=text, optimizer_cls_and_kwargs=chosen).create_optimizer()
    decay = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["param_names"]}
    assert [name for name, value in decay.items() if value] == ["model.norm.weight"]
