"""A real, small LLaMA, and its twin with backward-side layers."""

from collections.abc import Callable

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, set_seed


@pytest.fixture
def llama() -> Callable[..., LlamaForCausalLM]:
    def make(**settings: object) -> LlamaForCausalLM:
        set_seed(0)
        shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        config = LlamaConfig(**{**shape, "num_attention_heads": 4, "num_key_value_heads": 2, **settings})
        return LlamaForCausalLM(config)

    return make
