"""Settings of a fine-tuning run of a fraction of a second, on data that a word decides."""

from collections.abc import Callable
from pathlib import Path

import pytest

from subspan.training.config.settings import CheckpointConfig, FinetuneConfig, ScheduleConfig, SelectionConfig


@pytest.fixture
def small(bert: Path, data: tuple[Path, Path], tmp_path: Path) -> Callable[..., FinetuneConfig]:
    """Settings of a run that takes a fraction of a second. Keywords override them."""

    def make(**overrides: object) -> FinetuneConfig:
        settings: dict[str, object] = {
            "model": str(bert),
            "task": "classification",
            "data": str(data[0]),
            "validation_data": str(data[1]),
            "steps": 12,
            "batch_size": 8,
            "max_length": 24,
            "lr": 1e-2,
            "scale": 1.0,
            "rank": 4,
            "update_proj_gap": 5,
            "log_every": 1,
            "threads": 1,
            "device": "cpu",
            "out": str(tmp_path / "run"),
            "schedule": ScheduleConfig(shape="linear", min_lr_ratio=0.0),
            "evaluation": SelectionConfig(every=3),
            "checkpoint": CheckpointConfig(every=4, keep=1),
        }
        return FinetuneConfig(**{**settings, **overrides})

    return make
