"""Runs small enough to make in a second or two."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.labelled import examples, words_tokenizer, write_jsonl
from support.small_runs import config
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from subspan.training.config.settings import CheckpointConfig, EvaluationConfig, PretrainConfig
from subspan.training.data.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder with weights and without a head."""
    folder, tokenizer = tmp_path_factory.mktemp("models") / "bert", words_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=40, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model of bytes, with weights."""
    folder, tokenizer = tmp_path_factory.mktemp("models") / "llama", load_tokenizer("bytes")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, initializer_range=0.3, tie_word_embeddings=False,
        eos_token_id=256, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, Path]:
    """Training and validation files of two labels."""
    return write_jsonl(tmp_path / "train.jsonl", examples(48, 0)), write_jsonl(tmp_path / "held.jsonl", examples(18, 1))


@pytest.fixture
def small(corpus: Path, tmp_path: Path) -> Callable[..., PretrainConfig]:
    """Settings of a run that takes a second. Keywords override them."""

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
