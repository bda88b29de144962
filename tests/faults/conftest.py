"""A model that trains a step in milliseconds."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.small_runs import config

from subspan.training.config.settings import CheckpointConfig, EvaluationConfig, PretrainConfig

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


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A config.json: a LLaMA of one layer, hidden size 16."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture
def tiny(model: Path, corpus: Path, tmp_path: Path) -> Callable[..., PretrainConfig]:
    """Settings of a run of a moment; keywords override."""

    def make(**overrides: object) -> PretrainConfig:
        settings: dict[str, object] = {
            "model": str(model),
            "tokenizer": "bytes",
            "steps": 6,
            "batch_size": 2,
            "update_proj_gap": 3,
            "evaluation": EvaluationConfig(every=6, tokens=32),
            "checkpoint": CheckpointConfig(every=2, keep=3),
        }
        return config(corpus, tmp_path / "run", **{**settings, **overrides})

    return make
