"""Generated settings: each run trains a step, or is refused with an error of the user that names a setting."""

import logging
import shutil
import signal
import uuid
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from subspan.recipes import RECIPES
from subspan.training.config.settings import (
    CheckpointConfig,
    EvaluationConfig,
    OptimConfig,
    PretrainConfig,
    ScheduleConfig,
)
from subspan.training.pretraining import Pretraining, RunDivergedError
from subspan.training.signals import RunInterruptedError
from subspan.utils.errors import UserError

Make = Callable[..., PretrainConfig]
SECTIONS = {
    "optim": OptimConfig(),
    "schedule": ScheduleConfig(),
    "evaluation": EvaluationConfig(),
    "checkpoint": CheckpointConfig(),
}

SENSIBLE: dict[str, list[Any]] = {
    "rank": [1, 2, 4, 8, 15, 16, 24, 10**6],
    "update_proj_gap": [1, 2, 7, 10**9],
    "scale": [0.0, 0.25, 1.0],
    "lr": [0.0, 1e-5, 1e-2],
    "weight_decay": [0.0, 0.1],
    "clip": [None, 1e-6, 1.0, 1e9],
    "steps": [1, 2, 10, 10**12],
    "batch_size": [1, 2, 4, 6],
    "micro_batch_size": [None, 1, 2],
    "sequence_length": [1, 2, 5, 16, 64],
    "seed": [0, 1, 2**63 - 1],
    "precision": ["auto", "fp32", "bf16-mixed", "bf16"],
    "gradient_checkpointing": [True, False],
    "backward_side": [None, True, False],
    "log_every": [1, 10, 10**9],
    "tensorboard": [False],
    "threads": [None, 1, 2],
    "validation_data": [None, "FILE"],
    "optim.betas": [None, (0.9, 0.999), (0.0, 0.0), (0.5, 0.5)],
    "optim.eps": [None, 1e-8, 0.1],
    "optim.proj_type": ["std", "reverse_std", "left", "right"],
    "optim.transfer": [None, "keep", "rotate", "moments", "reset"],
    "optim.selector": [None, {}, {"power": 2.0}, {"floor": 0.2}, {"method": "svd"}, {"sample": "norm"}, {"at": 1},
                       {"scaled": True}],
    "optim.rule": [None, {}, {"momentum": 0.5}, {"betas": (0.8, 0.9)}, {"eps": 1e-6}],
    "optim.residual": [
        None,
        {},
        {"mode": "official"},
        {"limiter": None},
        {"name": "sketch"},
        {"name": "sketch", "width": 0.25, "draw": "cosines"},
    ],
    "optim.stagger": [None, True, False],
    "optim.share": ["auto", "none"],
    "optim.merge": ["step", "refresh"],
    "optim.eta": [None, 0.1, 1e6],
    "optim.proximal": ["coupled", "decoupled"],
    "optim.state_dtype": [None, "float32", "int8"],
    "optim.bf16_stochastic_round": [True, False],
    "optim.lr_full": [None, 0.0, 1e-3],
    "optim.targets": ["all-linear", ["q_proj"], ["mlp", "self_attn"], r".*\.up_proj", ["embed"]],
    "schedule.warmup_steps": [None, 0, 1],
    "schedule.min_lr_ratio": [0.0, 0.1, 1.0],
    "evaluation.every": [None, 1, 10**9],
    "evaluation.tokens": [1, 32, 500, 10**15],
    "checkpoint.every": [1, 100, 10**9],
    "checkpoint.keep": [1, 2, 10**9],
}  # fmt: skip
"""Most of these go together; some do not, and are then refused."""

NUMBERS = [0.0, -1.0, -1e9, 1e30, -0.5, 1.5, float("nan"), float("inf"), -float("inf"), 1e-300, 1e300]
ANYTHING = [0, -1, 10**15, None, "", "x", "NaN", [], [1], {}, {"a": 1}, True, 3, 2.5, *NUMBERS]
WHOLE = [0, -1, -(10**9)]
NONSENSE: dict[str, list[Any]] = {
    "optimizer": ["", "sara", "SARA_ADAMW", "sara_adamw ", "adamw_4bit", "../x", "sgd\n"],
    "model": ["", "llama-nan", "no/such/config.json", "/dev/null", "a/b/c", "\n", "FOLDER", "FILE"],
    "tokenizer": ["byte", "no/such", "FILE", "FOLDER", "\n"],
    "data": ["", "no.txt", "*.nothing", "FOLDER", "c4:no/such", "slimpajama:", "MODEL", "\n", "[", "c4:FOLDER"],
    "validation_data": ["no.txt", "FOLDER", "MODEL"],
    "resume": ["", "no/such", "FILE", "FOLDER", "\n"],
    "out": ["FILE", "FILE/run"],
    "packing": [False],
    "rank": [*WHOLE, 10**30],
    "update_proj_gap": [*WHOLE, 10**30],
    "scale": NUMBERS,
    "lr": NUMBERS,
    "weight_decay": NUMBERS,
    "clip": NUMBERS,
    "steps": [*WHOLE, 10**30],
    "batch_size": [*WHOLE, 10**30],
    "micro_batch_size": [*WHOLE, 5, 10**30],
    "sequence_length": [*WHOLE, 257, 10**6, 10**30],
    "seed": [-1, 2**63, 10**30],
    "threads": [*WHOLE, 10**9, 10**30],
    "log_every": [*WHOLE, 10**30],
    "device": ["cuda"],
    "optim.betas": [(1.0, 1.0), (-0.1, 0.9), (float("nan"), 0.9), (0.9, 2.0), (10.0**300, 0.0)],
    "optim.eps": NUMBERS,
    "optim.proj_type": ["", "up", "Std"],
    "optim.transfer": ["", "forget"],
    "optim.eta": NUMBERS,
    "optim.lr_full": NUMBERS,
    "optim.targets": ["", "[", "nothing", [], [""], ["nothing"], ["norm"], "(", ".*", ["lm_head"], ["bias"]],
    "optim.selector": [
        {"powr": 1},
        {"first": "random"},
        {"selector": "x"},
        {"": 1},
        {"total_steps": 0},
        {"total_steps": 10**30},
    ],
    "optim.rule": [{"momentun": 1}, {"": 1}, {"betas": 3}, {"betas": (0.9,)}, {"betas": ("a", "b")}],
    "optim.residual": [{"limitr": 1}, {"": 1}, {"name": "sketch", "width": 0}, {"name": "sketch", "draw": []}],
    "schedule.warmup_steps": [-1, 10**30],
    "schedule.min_lr_ratio": NUMBERS,
    "evaluation.every": [*WHOLE, 10**30],
    "evaluation.tokens": [*WHOLE, 10**30],
    "checkpoint.every": [*WHOLE, 10**30],
    "checkpoint.keep": [*WHOLE, 10**30],
}
"""Values of the type that a flag has, since the command line checks types. Inside a part's settings stands anything."""


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """Settings by name, such as ``optim.eps``: sensible ones, and in most cases some nonsense."""
    recipe = RECIPES[draw(st.sampled_from(sorted(RECIPES)))]
    given: dict[str, Any] = {"optimizer": recipe.name}
    for name in draw(st.lists(st.sampled_from(sorted(SENSIBLE)), max_size=8, unique=True)):
        given[name] = draw(st.sampled_from(SENSIBLE[name]))
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2, 4]))):
        if draw(st.integers(0, 2)):
            name = draw(st.sampled_from(sorted(NONSENSE)))
            given[name] = draw(st.sampled_from(NONSENSE[name]))
        else:
            part = draw(st.sampled_from(["selector", "rule", "residual"]))
            own = getattr(recipe, part)
            known = [field.name for field in fields(own)] if own else []
            given[f"optim.{part}"] = {draw(st.sampled_from([*known, "power"])): draw(st.sampled_from(ANYTHING))}
    return given


def built(given: dict[str, Any], make: Make, folder: Path) -> PretrainConfig:
    """The configuration; words in capitals stand for paths of the test's own."""
    base = make()
    places = {"FILE": base.data, "MODEL": base.model, "FOLDER": str(folder)}
    plain: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for name, value in given.items():
        if isinstance(value, str):
            for word, place in places.items():
                value = value.replace(word, place)
        section, _, field = name.rpartition(".")
        (sections[section] if section else plain)[field] = value
    start = {"evaluation": base.evaluation, "checkpoint": base.checkpoint}
    return make(
        **{name: replace(start.get(name, SECTIONS[name]), **changes) for name, changes in sections.items()} | plain
    )


def words(given: dict[str, Any], config: PretrainConfig) -> set[str]:
    """The names of the settings and the paths among them, one of which an error must name."""
    own = {name.rpartition(".")[2] for name in given} | {
        key for value in given.values() if isinstance(value, dict) for key in value
    }
    paths = {
        str(getattr(config, name))
        for name in ("model", "data", "validation_data", "tokenizer", "out", "resume")
        if name in given
    }
    return {word for word in own | paths if len(word) > 1}


def is_tame(given: dict[str, Any]) -> bool:
    """Whether no number is so large or small that weights in fp32 may overflow within a step."""
    values = [(name, value) for name, value in given.items() if not isinstance(value, dict)]
    values += [pair for value in given.values() if isinstance(value, dict) for pair in value.items()]
    for name, value in values:
        if isinstance(value, (int, float)) and name.rpartition(".")[2] in (
            "lr",
            "lr_full",
            "scale",
            "eta",
            "eps",
            "weight_decay",
        ):
            least = 0 if name.endswith(("lr", "lr_full", "scale", "weight_decay")) else 1e-30
            if not least <= value <= 1e6:
                return False
    return True


def outcome(config: PretrainConfig, finite: bool = False) -> str:
    """``trained``, or the message of a refusal. Any other error is raised.

    Args:
        finite: whether the weights must be finite after the step.
    """
    try:
        run = Pretraining(config)
    except UserError as error:
        return str(error)
    read = run.data.next_batch

    def next_batch(size: int) -> Any:
        signal.raise_signal(signal.SIGTERM)  # stops the run after its first step, however many there are
        return read(size)

    run.data.next_batch = next_batch  # type: ignore[method-assign]
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        run.run()
    except RunInterruptedError:
        pass
    except (UserError, RunDivergedError) as error:
        return str(error)
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert run.step == 1 or config.steps > 1  # type: ignore[operator]
    assert not finite or all(bool(p.isfinite().all()) for p in run.model.parameters())
    return "trained"


@pytest.mark.parametrize("cases", [pytest.param(60), pytest.param(1000, marks=[pytest.mark.slow])])
def test_generated_configurations(cases: int, tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The share of cases that train is checked too, since a generator of mere refusals would prove little."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("subspan.utils.atomic_files.sync", lambda path: None)  # the disk is not what is tested here
    folder = tmp_path / "empty"
    folder.mkdir()
    outcomes: list[str] = []
    logging.getLogger("subspan").setLevel(logging.ERROR)

    @settings(
        max_examples=cases,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(configurations())
    def try_one(given: dict[str, Any]) -> None:
        out = tmp_path / uuid.uuid4().hex
        config = built({"out": str(out)} | given, tiny, folder)
        try:
            message = outcome(config, is_tame(given))
        finally:
            torch.set_num_threads(1)
            shutil.rmtree(out, ignore_errors=True)
        outcomes.append(message.partition(":")[0])
        if message != "trained":
            assert "\n" not in message
            assert len(message) > 20
            if "the run diverged" not in message:
                assert any(word in message + message.replace("-", "_") for word in words(given, config)), message

    try_one()
    trained = outcomes.count("trained")
    assert len(outcomes) >= cases
    assert 0.2 < trained / len(outcomes) < 0.9, f"{trained} of {len(outcomes)} trained"
