"""The shapes of a LLaMA. They follow from a few numbers, and no model is built."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

VOCABULARY = 32_000  # that of T5, which the papers' models have


@dataclass(frozen=True)
class Layer:
    """A linear layer of a block, with the weight ``W (out, inputs)``."""

    name: str
    """Its name in a block."""
    out: int
    inputs: int

    @property
    def numel(self) -> int:
        """Number of entries of its weight."""
        return self.out * self.inputs


@dataclass(frozen=True)
class Llama:
    """The sizes of a LLaMA."""

    d: int
    """Width of the model."""
    f: int
    """Width of the MLP."""
    layers: int
    heads: int
    kv: int
    """Width of the keys of all heads together, and of the values."""
    v: int = VOCABULARY
    """Tokens in the vocabulary."""

    def config(self, sequence_length: int) -> Any:
        """The config of transformers' LLaMA, with as many positions as the sequences need."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.v,
            hidden_size=self.d,
            intermediate_size=self.f,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv * self.heads // self.d,
            max_position_embeddings=max(1024, sequence_length),
            tie_word_embeddings=False,
        )

    @property
    def sharing(self) -> list[list[Layer]]:
        """The linear layers of a block. Those that are fed by one tensor are together: q, k, v; o; gate, up; down."""
        d, f, kv = self.d, self.f, self.kv
        return [
            [Layer("self_attn.q_proj", d, d), Layer("self_attn.k_proj", kv, d), Layer("self_attn.v_proj", kv, d)],
            [Layer("self_attn.o_proj", d, d)],
            [Layer("mlp.gate_proj", f, d), Layer("mlp.up_proj", f, d)],
            [Layer("mlp.down_proj", d, f)],
        ]

    @property
    def block(self) -> list[Layer]:
        """The linear layers of a block."""
        return [layer for group in self.sharing for layer in group]

    @property
    def block_vectors(self) -> list[tuple[int, ...]]:
        """The shapes of the other parameters of a block."""
        return [(self.d,)] * 2

    @property
    def outside(self) -> list[tuple[int, ...]]:
        """The shapes of the parameters outside of blocks: embedding, last norm, head."""
        return [(self.v, self.d), (self.d,), (self.v, self.d)]

    @property
    def buffers(self) -> int:
        """Number of entries of the buffers: the frequencies of the rotary embedding, which transformers keeps twice."""
        return 2 * (self.d // self.heads // 2)

    def parameters(self) -> Iterator[tuple[int, ...]]:
        """The shape of every parameter."""
        for _ in range(self.layers):
            yield from ((layer.out, layer.inputs) for layer in self.block)
            yield from self.block_vectors
        yield from self.outside

    @property
    def numel(self) -> int:
        """Number of entries of all parameters."""
        return sum(map(math.prod, self.parameters()))


def padded(shape: Sequence[int], world: int) -> int:
    """Number of entries of a parameter whose rows are filled up to a multiple of ``world``, as ``fully_shard`` does."""
    return -(-shape[0] // world) * world * math.prod(shape[1:])
