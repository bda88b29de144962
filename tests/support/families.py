"""Tiny models of the families that people bring, each of its real class, with a batch to train it on.

The sizes differ from each other, so that a side or an order that is taken wrongly shows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

HIDDEN, INNER, WORDS = 32, 48, 64
COMMON = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2, "num_attention_heads": 2}
NO_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TEXT = COMMON | {"vocab_size": WORDS, "max_position_embeddings": 40} | NO_TOKENS
GROUPED = TEXT | {"num_key_value_heads": 1, "head_dim": 16}
EXPERTS = GROUPED | {"num_experts_per_tok": 2, "output_router_logits": True}
IMAGES = COMMON | {"image_size": 16, "patch_size": 4, "num_channels": 3}
EACH_SIDE = {
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": INNER, "decoder_ffn_dim": INNER, "d_model": HIDDEN, "vocab_size": WORDS,
    "decoder_start_token_id": 1, **NO_TOKENS,
}  # fmt: skip

ATTENTION = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
GATED = [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]


def ids(seed: int = 0, length: int = 12, rows: int = 4) -> Tensor:
    return torch.randint(3, WORDS, (rows, length), generator=torch.Generator().manual_seed(seed))


def as_text() -> dict[str, Tensor]:
    return {"input_ids": ids(), "labels": ids()}


def as_image() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(4, 3, 16, 16, generator=generator), "labels": torch.tensor([0, 1, 1, 0])}


def as_speech() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"input_features": torch.randn(4, 8, 32, generator=generator), "labels": ids(length=8)}


def as_pairs() -> dict[str, Any]:
    return {"input_ids": ids(), "pixel_values": as_image()["pixel_values"], "return_loss": True}


@dataclass(frozen=True)
class Family:
    """One family, and what is projected of it.

    Attributes:
        kind: class of the model, in transformers or here.
        settings: of its config.
        projected: endings of the names of all projected matrices.
        transposed: the endings of those that are ``(in, out)``.
        stacks: the endings of those that are stacks, which backward-side layers leave out.
        batch: makes inputs with which the model returns a loss.
        task: what the command line fine-tunes it for; ``None`` if nothing.
        shares: whether some of its layers have one input.
        is_causal: whether the command line pretrains it.
    """

    kind: str
    settings: dict[str, Any]
    projected: list[str]
    transposed: tuple[str, ...] = ()
    stacks: tuple[str, ...] = ()
    batch: Callable[[], dict[str, Any]] = as_text
    task: str | None = None
    is_causal: bool = False
    shares: bool = True

    def config(self) -> Any:
        model_class = getattr(transformers, self.kind)
        return model_class.config_class(**self.settings)

    def build(self) -> nn.Module:
        torch.manual_seed(1)
        if self.kind in OWN:
            return OWN[self.kind]()
        return getattr(transformers, self.kind)(self.config())


class Block(nn.Module):
    """A block of a diffusion transformer: a modulation by the time, attention to a context, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.Module()
        self.norm1.linear = nn.Linear(HIDDEN, 4 * HIDDEN)
        self.norm1.norm = nn.LayerNorm(HIDDEN, elementwise_affine=False)
        self.attn = nn.MultiheadAttention(HIDDEN, 2, batch_first=True)
        self.norm2 = nn.LayerNorm(HIDDEN)
        self.ff = nn.Sequential(nn.Linear(HIDDEN, INNER), nn.GELU(), nn.Linear(INNER, HIDDEN))

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        shift, scale, gate, gate2 = self.norm1.linear(time).unsqueeze(1).chunk(4, -1)
        h = self.norm1.norm(x) * (1 + scale) + shift
        x = x + gate * self.attn(torch.cat([h, context], 1), context, context)[0][:, : x.shape[1]]
        return x + gate2 * self.ff(self.norm2(x))


class DiT(nn.Module):
    """A tiny diffusion transformer on pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.x_embedder = nn.Conv2d(3, HIDDEN, 4, 4)
        self.context_embedder = nn.Linear(24, HIDDEN)
        self.time_embed = nn.Embedding(50, HIDDEN)
        self.pos_embed = nn.Parameter(torch.zeros(1, 16, HIDDEN))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(HIDDEN, 48)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Any:
        x = self.x_embedder(pixel_values).flatten(2).mT + self.pos_embed
        time, context = self.time_embed(labels), pixel_values.new_ones(len(x), 3, 24)
        context = self.context_embedder(context)
        for block in self.blocks:
            x = block(x, time, context)
        return Loss((self.head(x).flatten(1) - pixel_values.flatten(1)).square().mean())


class ConvNet(nn.Module):
    """A tiny conv net, of which a third is a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3, 2), nn.Conv2d(16, 32, 3, 2)
        self.hidden, self.head = nn.Linear(288, 24), nn.Linear(24, 2)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Any:
        x = torch.relu(self.conv2(torch.relu(self.conv1(pixel_values)))).flatten(1)
        return Loss(nn.functional.cross_entropy(self.head(torch.relu(self.hidden(x))), labels))


@dataclass
class Loss:
    loss: Tensor


OWN: dict[str, Callable[[], nn.Module]] = {"DiT": DiT, "ConvNet": ConvNet}

_ATTENTION = [f"self_attn.{name}_proj.weight" for name in ("q", "k", "v", "out")]
_BART = [*_ATTENTION, *(name.replace("self", "encoder") for name in _ATTENTION), "fc1.weight", "fc2.weight"]
_BERT = [
    *(f"attention.self.{name}.weight" for name in ("query", "key", "value")),
    "attention.output.dense.weight",
    "intermediate.dense.weight",
    "output.dense.weight",
]
_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
_BOTH = ("gate_up_proj", "down_proj")

FAMILIES = {
    "Llama": Family("LlamaForCausalLM", GROUPED, ATTENTION + GATED, task="lm", is_causal=True),
    "Qwen2": Family("Qwen2ForCausalLM", GROUPED, ATTENTION + GATED, task="lm", is_causal=True),
    "Qwen3": Family("Qwen3ForCausalLM", GROUPED, ATTENTION + GATED, task="lm", is_causal=True),
    "Gemma": Family("GemmaForCausalLM", GROUPED, ATTENTION + GATED, task="lm", is_causal=True),
    "Mistral": Family("MistralForCausalLM", GROUPED, ATTENTION + GATED, task="lm", is_causal=True),
    "Phi-3": Family(
        "Phi3ForCausalLM",
        GROUPED,
        ["self_attn.qkv_proj.weight", "self_attn.o_proj.weight", "mlp.gate_up_proj.weight", "mlp.down_proj.weight"],
        task="lm",
        is_causal=True,
        shares=False,
    ),
    "GPT-2": Family(
        "GPT2LMHeadModel",
        {"n_embd": HIDDEN, "n_inner": INNER, "n_layer": 2, "n_head": 2, "vocab_size": WORDS, "n_positions": 40, **NO_TOKENS},
        ["attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"],
        transposed=("weight",),
        task="lm",
        is_causal=True,
        shares=False,
    ),
    "GPT-NeoX": Family(
        "GPTNeoXForCausalLM",
        TEXT,
        [
            *("attention.query_key_value.weight", "attention.dense.weight"),
            *("mlp.dense_h_to_4h.weight", "mlp.dense_4h_to_h.weight"),
        ],
        task="lm",
        is_causal=True,
        shares=False,
    ),
    "OPT": Family(
        "OPTForCausalLM",
        {key: value for key, value in TEXT.items() if key != "intermediate_size"}
        | {"ffn_dim": INNER, "word_embed_proj_dim": 24},
        [*_ATTENTION, "fc1.weight", "fc2.weight", "project_in.weight", "project_out.weight"],
        task="lm",
        is_causal=True,
    ),
    "Mixtral": Family(
        "MixtralForCausalLM", EXPERTS | {"num_local_experts": 12}, ATTENTION + _EXPERTS, stacks=_BOTH, task="lm", is_causal=True
    ),
    "Qwen3-MoE": Family(
        "Qwen3MoeForCausalLM",
        EXPERTS | {"num_experts": 12, "moe_intermediate_size": 24},
        ATTENTION + _EXPERTS,
        stacks=_BOTH,
        task="lm",
        is_causal=True,
    ),
    "gpt-oss": Family(
        "GptOssForCausalLM",
        EXPERTS | {"num_local_experts": 12},
        ATTENTION + _EXPERTS,
        transposed=_BOTH,
        stacks=_BOTH,
        task="lm",
        is_causal=True,
    ),
    "DeepSeek-V3": Family(
        "DeepseekV3ForCausalLM",
        TEXT | {
            "n_routed_experts": 12, "moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
            "kv_lora_rank": 12, "q_lora_rank": 12, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
            "num_experts_per_tok": 2, "num_key_value_heads": 2,
        },
        [
            *(f"self_attn.{name}.weight" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")),
            *GATED,
            *_EXPERTS,
            *(name.replace("mlp", "mlp.shared_experts") for name in GATED),
        ],
        stacks=_BOTH,
        task="lm",
        is_causal=True,
    ),
    "T5": Family(
        "T5ForConditionalGeneration",
        {"d_model": HIDDEN, "d_ff": INNER, "d_kv": 16, "num_heads": 2, "num_layers": 2, "vocab_size": WORDS,
         "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2},
        [
            *(f"{kind}.{name}.weight" for kind in ("SelfAttention", "EncDecAttention") for name in "qkvo"),
            *("DenseReluDense.wi.weight", "DenseReluDense.wo.weight"),
        ],
        task="seq2seq",
    ),
    "BART": Family(
        "BartForConditionalGeneration", EACH_SIDE | {"max_position_embeddings": 40}, _BART, task="seq2seq"
    ),
    "Whisper": Family(
        "WhisperForConditionalGeneration",
        EACH_SIDE | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16},
        _BART,
        batch=as_speech,
    ),
    "BERT": Family("BertForMaskedLM", TEXT, [*_BERT, "cls.predictions.transform.dense.weight"], task="classification"),
    "RoBERTa": Family("RobertaForMaskedLM", TEXT | {"max_position_embeddings": 400}, _BERT, task="classification"),
    "ViT": Family(
        "ViTForImageClassification",
        IMAGES,
        [
            *(f"attention.{name}_proj.weight" for name in "qkvo"),
            *("mlp.fc1.weight", "mlp.fc2.weight"),
        ],
        batch=as_image,
    ),
    "CLIP": Family(
        "CLIPModel",
        {"text_config": TEXT, "vision_config": IMAGES, "projection_dim": 20},
        [
            *_ATTENTION,
            *("mlp.fc1.weight", "mlp.fc2.weight", "visual_projection.weight", "text_projection.weight"),
        ],
        batch=as_pairs,
    ),
    "DiT": Family(
        "DiT",
        {},
        [
            *("norm1.linear.weight", "context_embedder.weight", "attn.in_proj_weight", "attn.out_proj.weight"),
            *("ff.0.weight", "ff.2.weight"),
        ],
        stacks=("in_proj_weight", "out_proj.weight"),
        batch=as_image,
        shares=False,
    ),
    "conv net": Family("ConvNet", {}, ["hidden.weight"], batch=as_image, shares=False),
}  # fmt: skip
