"""A real, small LLaMA and a text it can learn, for the frameworks to train."""

from collections.abc import Callable

import pytest
from support.frameworks import Text
from transformers import LlamaConfig, LlamaForCausalLM, set_seed


@pytest.fixture
def text() -> Text:
    return Text()


@pytest.fixture
def llama() -> Callable[[], LlamaForCausalLM]:
    def make() -> LlamaForCausalLM:
        set_seed(0)
        config = LlamaConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
        return LlamaForCausalLM(config)

    return make
