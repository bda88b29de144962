"""A causal model of bytes, small enough for a step in a moment."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from subspan.training.data.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with weights and a tokenizer, which has no chat template."""
    folder, tokenizer = tmp_path_factory.mktemp("models") / "llama", load_tokenizer("bytes")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=512, initializer_range=0.3, tie_word_embeddings=False,
        eos_token_id=256, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
