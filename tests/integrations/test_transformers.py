"""The real ``Trainer`` with the tuple of the README: what it projects, which settings reach it, and exact resume."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.frameworks import PROJECTED, STEPS, projected
from torch.optim import Optimizer
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import subspan
from subspan.integrations.transformers import Subspace, register
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
    run = trainer(llama(), text, arguments(tmp_path, warmup_steps=2, max_steps=STEPS + 4), name=name)
    run.train()
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    rates = [row["learning_rate"] for row in run.state.log_history if "loss" in row]
    assert len(losses) == STEPS + 4
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


def test_a_version_that_hands_over_groups(llama: Any, text: Any, tmp_path: Path) -> None:
    """transformers 4.57 calls the class with groups, or with the model of the dict: the optimizer is the same."""
    args = arguments(tmp_path, weight_decay=0.1)

    class Older(Trainer):
        def create_optimizer(self, model: Any = None) -> Optimizer:
            groups: Any = [{"params": list(self.model.parameters()), "weight_decay": 0.1}]
            chosen, settings = self.optimizer_cls_and_kwargs
            groups = settings.pop("model", groups)
            return chosen(groups, **settings)

    found = []
    for kind, more in ((Trainer, {}), (Older, {}), (Older, {"model": True}), (Older, {"model": True, "args": args})):
        model = llama()
        chosen = {"name": "sara_adamw", "rank": 4, **({**more, "model": model} if more else {})}
        run = kind(model=model, args=args, train_dataset=text, optimizer_cls_and_kwargs=(Subspace, chosen))
        optimizer = run.create_optimizer()
        found.append(
            [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        )
        assert projected(optimizer) == PROJECTED
    assert found[1:] == found[:1] * 3
    with pytest.raises(SettingError, match="parameter groups do not lead to their model, and no Trainer is calling"):
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
        def create_optimizer(self, *model: Any) -> Optimizer:
            with pytest.raises(SettingError, match="no Trainer is calling"):
                by_hand(self.model)
            seen.append(super().create_optimizer(*model))
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


# --- optim_args, optim_target_modules, and names in TrainingArguments


def test_optim_args(llama: Any, text: Any, tmp_path: Path) -> None:
    """They are settings of ``create``; those of the tuple win."""
    args = arguments(
        tmp_path, optim_args="rank=8, update_proj_gap=7,scale=0.5,betas=(0.8,0.9),stagger=true,proj_type=std"
    )
    chosen = (Subspace, {"name": "sara_adamw", "update_proj_gap": 3})
    run = Trainer(model=llama(), args=args, train_dataset=text, optimizer_cls_and_kwargs=chosen)
    optimizer: Any = run.create_optimizer()
    group = optimizer.param_groups[0]
    found = [group[key] for key in ("rank", "update_proj_gap", "scale", "betas", "proj_type")]
    assert found == [8, 3, 0.5, (0.8, 0.9), "std"]
    assert optimizer.stagger


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("rank", r"optim_args='rank': 'rank' is no name=value; write it like rank=8,update_proj_gap=7"),
        ("rank=8,=3", r"'=3' is no name=value"),
        ("rnk=8", r"rnk.*did you mean rank"),
        ("rank=eight", r"rank='eight'"),
    ],
)
def test_optim_args_that_are_none(llama: Any, text: Any, tmp_path: Path, given: str, words: str) -> None:
    run = Trainer(
        model=llama(),
        args=arguments(tmp_path, optim_args=given),
        train_dataset=text,
        optimizer_cls_and_kwargs=(Subspace, {"name": "sara_adamw"}),
    )
    with pytest.raises((SettingError, TypeError), match=words):
        run.create_optimizer()


TARGETS: dict[str, tuple[Any, Any]] = {
    "all-linear": ("all-linear", lambda name: True),
    "all_linear": ("all_linear", lambda name: True),
    "parts of names": (["q_proj", "up_proj"], lambda name: "q_proj" in name or "up_proj" in name),
    "expressions": ([r".*.attn.*", r".*.mlp.down_proj"], lambda name: "attn" in name or "down_proj" in name),
    "one expression": (r".*\.layers\.1\..*", lambda name: "layers.1" in name),
}


@pytest.mark.parametrize(("asked", "belongs"), TARGETS.values(), ids=TARGETS)
def test_target_modules(llama: Any, text: Any, tmp_path: Path, asked: Any, belongs: Any) -> None:
    """Each form that transformers documents chooses the linear layers that transformers' GaLore would take."""
    run = trainer(llama(), text, arguments(tmp_path, optim_target_modules=asked))
    assert projected(run.create_optimizer()) == {name for name in PROJECTED if belongs(name)}
    if asked != "all_linear":
        theirs = trainer(llama(), text, arguments(tmp_path), targets=asked).create_optimizer()
        assert projected(theirs) == {name for name in PROJECTED if belongs(name)}


def test_target_modules_take_linear_layers_only(llama: Any, text: Any, tmp_path: Path) -> None:
    run = trainer(llama(), text, arguments(tmp_path, optim_target_modules=[".*"]))
    assert projected(run.create_optimizer()) == PROJECTED | {"lm_head.weight"}
    with pytest.raises(
        SettingError, match=r"optim_target_modules=\['nothing'\]: matches no nn.Linear; .*'model.layers.0"
    ):
        trainer(llama(), text, arguments(tmp_path, optim_target_modules=["nothing"])).create_optimizer()


def test_registered_names(llama: Any, text: Any, tmp_path: Path) -> None:
    """A script that knows nothing of this library chooses an optimizer by ``TrainingArguments`` alone."""
    names = register()
    assert register() == names
    assert {"sara_adamw", "subspan_galore_adamw", "subspan_sgd"} <= set(names)
    assert not {"galore_adamw", "sgd", "adafactor"} & set(names)  # transformers' own
    args = arguments(
        tmp_path,
        optim="sara_adamw",
        optim_args="rank=8,update_proj_gap=7",
        optim_target_modules=[r".*.attn.*"],
        weight_decay=0.1,
    )
    run = Trainer(model=llama(), args=args, train_dataset=text)
    run.train()
    optimizer: Any = run.optimizer.optimizer
    assert projected(optimizer) == {name for name in PROJECTED if "attn" in name}
    assert (optimizer.param_groups[0]["rank"], optimizer.param_groups[0]["update_proj_gap"]) == (8, 7)
    assert (optimizer.seed, optimizer.param_groups[0]["weight_decay"]) == (3, 0.1)
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    again = Trainer(model=llama(), args=arguments(tmp_path, optim="adamw_torch"), train_dataset=text)
    assert isinstance(again.create_optimizer(), torch.optim.AdamW)


def test_a_script_is_run_with_the_names(tmp_path: Path) -> None:
    """``python -m subspan.integrations.transformers`` changes nothing in a script but the names that it knows."""
    script = tmp_path / "script.py"
    script.write_text(
        "from transformers import HfArgumentParser, TrainingArguments\n"
        "args, = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()\n"
        "print(args.optim.value, args.optim_args, __name__)\n"
    )
    module = "subspan.integrations.transformers"
    given = ["--output_dir", str(tmp_path), "--optim", "rso_adamw", "--optim_args", "rank=8"]
    for target, folder in (([str(script)], None), (["-m", "script"], tmp_path)):
        done = subprocess.run(
            [sys.executable, "-m", module, *target, *given], capture_output=True, text=True, cwd=folder, check=True
        )
        assert done.stdout.split()[-3:] == ["rso_adamw", "rank=8", "__main__"]


def test_another_optim_beside_the_tuple_is_said(
    llama: Any, text: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    optimizer_of(llama(), text, arguments(tmp_path, optim="adafactor"))
    assert "optim='adafactor' of TrainingArguments: not used; the optimizer is 'sara_adamw'" in caplog.text


# --- rates


def test_a_rate_that_nobody_has_chosen_is_said(
    llama: Any, text: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The default of TrainingArguments learns nothing at scale 0.25, and the recipe's own rate is one argument."""
    default = TrainingArguments(str(tmp_path), use_cpu=True)
    optimizer = optimizer_of(llama(), text, default)
    assert optimizer.param_groups[0]["lr"] == 5e-5
    (said,) = [row.getMessage() for row in caplog.records if "learning_rate" in row.getMessage()]
    assert "learning_rate=5e-05 is the default of TrainingArguments" in said
    assert "The rate of 'sara_adamw' is 0.01: give it, another one, or lr='recipe'" in said
    caplog.clear()
    for args, settings in (
        (default, {"lr": "recipe"}),
        (TrainingArguments(str(tmp_path), use_cpu=True, optim_args="lr=recipe"), {}),
        (default, {"lr": 0.01}),
        (arguments(tmp_path), {}),
    ):
        assert optimizer_of(llama(), text, args, **settings).param_groups[0]["lr"] == 0.01
    assert optimizer_of(llama(), text, default, name="adamw").param_groups[0]["lr"] == 5e-5  # full rank
    assert "learning_rate" not in caplog.text


# --- steps in the backward pass


@pytest.mark.parametrize("name", ["sara_adamw", "fira_adamw"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_step_in_backward(llama: Any, text: Any, tmp_path: Path, name: str, accumulate: int) -> None:
    """The weights of stepping afterwards, without clipping, over epochs that end with fewer micro-batches; a norm is
    logged at every step.
    """
    ended, norms = [], []
    for in_backward in (True, False):
        args = arguments(
            tmp_path,
            gradient_accumulation_steps=accumulate,
            max_grad_norm=0.0,
            max_steps=-1,
            num_train_epochs=2,
            save_strategy="no",
        )
        run = trainer(llama(), text, args, name=name, step_in_backward=in_backward)
        run.train()
        assert run.state.global_step == 2 * -(-8 // accumulate)
        ended.append(weights(run.model))
        norms.append([row["grad_norm"] for row in run.state.log_history if "grad_norm" in row])
    for key, value in ended[1].items():
        torch.testing.assert_close(ended[0][key], value, rtol=1e-5, atol=1e-6)
    # transformers 4.57 asks for no norm where it does not clip.
    assert len(norms[0]) == len(norms[1]) == (run.state.global_step if int(transformers.__version__[0]) > 4 else 0)
    if not norms[0]:
        return
    assert norms[0][0] == pytest.approx(norms[1][0], rel=1e-4)  # all bases are due, so both are of gradients
    if name == "fira_adamw":  # whose residual needs the whole gradient
        assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    else:
        assert all(ours <= theirs * 1.001 for ours, theirs in zip(*norms, strict=True))


def test_step_in_backward_clips(llama: Any, text: Any, tmp_path: Path) -> None:
    """``max_grad_norm`` clips by the norm of the step before, and resumes exactly."""
    whole = trainer(llama(), text, arguments(tmp_path / "whole", max_grad_norm=0.3), step_in_backward=True)
    whole.train()
    hooks: Any = whole.optimizer.optimizer._in_backward
    assert hooks.settings == (1, "lagged_global", 0.3)
    norms = [row["grad_norm"] for row in whole.state.log_history if "grad_norm" in row]
    assert min(norms) > 0.3
    assert whole.optimizer.optimizer.param_groups[0]["lagged_norm"] == pytest.approx(norms[-1], rel=1e-5)
    again = trainer(llama(), text, arguments(tmp_path / "whole", max_grad_norm=0.3), step_in_backward=True)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    ended, expected = weights(again.model), weights(whole.model)
    assert all(torch.equal(ended[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("chosen", "settings", "words"),
    [
        ({"name": "adamw", "step_in_backward": True}, {}, "step_in_backward=True: AdamW is torch's own"),
        ({"clip": "per_param"}, {}, "clip='per_param': is for step_in_backward=True"),
        ({"step_in_backward": True, "clip": "global"}, {}, "clip='global': expected 'none', 'per_param'"),
    ],
)
def test_steps_that_cannot_be_taken_in_backward(
    llama: Any, text: Any, tmp_path: Path, chosen: Any, settings: Any, words: str
) -> None:
    with pytest.raises(SettingError, match=words):
        optimizer_of(llama(), text, arguments(tmp_path, **settings), **chosen)


def test_a_scaler_is_refused(llama: Any, text: Any, tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args.fp16 = True  # TrainingArguments itself refuses it on most CPUs
    with pytest.raises(SettingError, match="with fp16 a GradScaler looks at all gradients before a step"):
        Subspace()(llama(), "sara_adamw", args, rank=4, step_in_backward=True)


# --- what others pass to the Trainer


def test_the_class_itself_says_that_it_projects_embeddings(
    llama: Any, text: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The Trainer gives a class groups without names, so nothing tells an embedding from a layer."""
    chosen: Any = (subspan.SubspaceAdamW, {"rank": 8, "lr": 1e-2})
    Trainer(
        model=llama(), args=arguments(tmp_path), train_dataset=text, optimizer_cls_and_kwargs=chosen
    ).create_optimizer()
    assert "projects every matrix, embeddings and heads too" in caplog.text
    assert "subspan.integrations.transformers.Subspace" in caplog.text
