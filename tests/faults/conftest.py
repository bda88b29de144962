"""A model that trains a step in milliseconds, and a cache of tokens for each worker."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from subspan.training.config import CheckpointConfig, EvaluationConfig, PretrainConfig

TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 257,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


@pytest.fixture(autouse=True, scope="session")
def token_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUBSPAN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A config.json: a LLaMA of one layer, hidden size 16."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Forty short documents in one JSONL file."""
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(f'{{"text": "document {i}: {"the quick brown fox " * (5 + i)}"}}\n' for i in range(40)))
    return path


@pytest.fixture
def tiny(model: Path, corpus: Path, tmp_path: Path) -> Callable[..., PretrainConfig]:
    """Settings of a run of a moment; keywords override."""

    def make(**overrides: object) -> PretrainConfig:
        settings: dict[str, object] = {
            "model": str(model),
            "tokenizer": "bytes",
            "data": str(corpus),
            "steps": 6,
            "batch_size": 2,
            "sequence_length": 16,
            "rank": 4,
            "update_proj_gap": 3,
            "threads": 1,
            "device": "cpu",
            "out": str(tmp_path / "run"),
            "evaluation": EvaluationConfig(every=6, tokens=32),
            "checkpoint": CheckpointConfig(every=2, keep=3),
        }
        return PretrainConfig(**{**settings, **overrides})

    return make
