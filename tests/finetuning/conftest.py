"""Models of a few thousand parameters and data that a word decides: runs of a fraction of a second."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from finetuning.common import examples, words_tokenizer, write_jsonl
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from subspan.training.config import CheckpointConfig, FinetuneConfig, ScheduleConfig, SelectionConfig
from subspan.training.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder with weights, without a head."""
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
    """A causal model with weights, of bytes."""
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
def small(bert: Path, data: tuple[Path, Path], tmp_path: Path) -> Callable[..., FinetuneConfig]:
    """Settings of a run of a fraction of a second; keywords override."""

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
