"""Runs small enough to make in a second or two."""

from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import config

from subspan.training.config import CheckpointConfig, EvaluationConfig, PretrainConfig


@pytest.fixture
def small(corpus: Path, tmp_path: Path) -> Callable[..., PretrainConfig]:
    """Settings of a run of a second; keywords override."""

    def make(**overrides: object) -> PretrainConfig:
        settings: dict[str, object] = {
            "model": "llama-nano",
            "steps": 12,
            "batch_size": 4,
            "update_proj_gap": 5,
            "log_every": 1,
            "evaluation": EvaluationConfig(every=6, tokens=64),
            "checkpoint": CheckpointConfig(every=4, keep=2),
        }
        return config(corpus, tmp_path / "run", **{**settings, **overrides})

    return make
