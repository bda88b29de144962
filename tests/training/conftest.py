"""A cache of tokens shared by the tests of a worker, and runs small enough to make in a second or two."""

from collections.abc import Callable
from pathlib import Path

import pytest

from subspan.training.config import CheckpointConfig, EvaluationConfig, PretrainConfig


@pytest.fixture(autouse=True, scope="session")
def token_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUBSPAN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Forty short documents in one JSONL file."""
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(f'{{"text": "document {i}: {"the quick brown fox " * (5 + i)}"}}\n' for i in range(40)))
    return path


@pytest.fixture
def small(corpus: Path, tmp_path: Path) -> Callable[..., PretrainConfig]:
    """Settings of a run of a second; keywords override."""

    def make(**overrides: object) -> PretrainConfig:
        settings: dict[str, object] = {
            "model": "llama-nano",
            "data": str(corpus),
            "steps": 12,
            "batch_size": 4,
            "sequence_length": 16,
            "rank": 4,
            "update_proj_gap": 5,
            "log_every": 1,
            "threads": 1,
            "device": "cpu",
            "out": str(tmp_path / "run"),
            "evaluation": EvaluationConfig(every=6, tokens=64),
            "checkpoint": CheckpointConfig(every=4, keep=2),
        }
        return PretrainConfig(**{**settings, **overrides})

    return make
