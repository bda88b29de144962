"""Models: the published shapes, and what any config or directory gives or is refused for."""

import json
from pathlib import Path

import pytest
import torch
from support.labelled import words_tokenizer
from transformers import LlamaForCausalLM, RobertaConfig, RobertaForSequenceClassification

from subspan.training.data.tokenizer import load_tokenizer
from subspan.training.models import build
from subspan.training.models.build import _llama, build_model
from subspan.training.models.presets import PRESETS
from subspan.utils.errors import InputError

BYTES = load_tokenizer("bytes")

# Parameters without embedding and head, from GaLore's configs: layers * (4 d² + 3 d f + 2 d) + d.
BODY = {
    "llama-60m": 8 * (4 * 512**2 + 3 * 512 * 1376 + 2 * 512) + 512,
    "llama-130m": 12 * (4 * 768**2 + 3 * 768 * 2048 + 2 * 768) + 768,
    "llama-350m": 24 * (4 * 1024**2 + 3 * 1024 * 2736 + 2 * 1024) + 1024,
    "llama-1b": 24 * (4 * 2048**2 + 3 * 2048 * 5461 + 2 * 2048) + 2048,
    "llama-7b": 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096,
}


@pytest.mark.parametrize("name", PRESETS)
def test_shapes(name: str) -> None:
    preset = PRESETS[name]
    with torch.device("meta"):
        model = LlamaForCausalLM(_llama(preset, BYTES, preset.sequence_length))
    total = sum(p.numel() for p in model.parameters())
    if name in BODY:
        assert total == BODY[name] + 2 * 257 * preset.hidden
    assert preset.hidden % preset.heads == 0
    assert model.config.max_position_embeddings >= preset.sequence_length


def test_the_seed_alone_sets_the_weights() -> None:
    first = build_model("llama-nano", BYTES, 16, seed=3)
    torch.rand(7)
    same, other = build_model("llama-nano", BYTES, 16, seed=3), build_model("llama-nano", BYTES, 16, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True))
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


def test_a_directory_brings_its_weights_and_a_config_does_not(tmp_path: Path) -> None:
    model = build_model("llama-nano", BYTES, 16, seed=3)
    model.save_pretrained(tmp_path / "whole")
    again = build_model(str(tmp_path / "whole"), BYTES, 16, seed=9)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    config = tmp_path / "config.json"
    config.write_text((tmp_path / "whole" / "config.json").read_text())
    fresh = build_model(str(config), BYTES, 16, seed=9)
    assert [p.shape for p in fresh.parameters()] == [p.shape for p in model.parameters()]
    assert not torch.equal(next(fresh.parameters()), next(model.parameters()))


def test_positions_begin_behind_that_of_padding(tmp_path: Path) -> None:
    """RoBERTa with 40 positions and padding 0 has room for 39 tokens: as many run, and one more does not."""
    words = words_tokenizer()
    config = RobertaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=40, pad_token_id=0,
    )  # fmt: skip
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    model = build_model(str(tmp_path), words, 39, 0, ("a", "b"), "max_length").eval()
    assert model(input_ids=torch.full((1, 39), 7)).logits.shape == (1, 2)
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, 40), 7))
    with pytest.raises(InputError, match=r"max_length=40: the model .* has 39 positions"):
        build_model(str(tmp_path), words, 40, 0, ("a", "b"), "max_length")


def test_a_tokenizer_larger_than_the_model(tmp_path: Path) -> None:
    build_model("llama-nano", BYTES, 16, seed=3).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"knows 257 tokens, the tokenizer 4096"):
        build_model(str(tmp_path), load_tokenizer("embedded"), 16, seed=0)


@pytest.mark.parametrize("name", ["llama-nanoo", "./nowhere", "/no/where/config.json"])
def test_unknown_names_list_near_ones(name: str) -> None:
    with pytest.raises(InputError, match=r"is unknown; .*llama-nano"):
        build_model(name, BYTES, 16, seed=0)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b'{"model_type": "llama", "num_attention_heads": 0}'),
        ("config.json", b'{"model_type": "llama", "hidden_act": "none"}'),
        ("config.json", b'{"model_type": "vit"}'),
        ("model.safetensors", b"broken"),
        ("pytorch_model.bin", b"junkjunk"),
        ("pytorch_model.bin", b""),
        ("model.safetensors.index.json", b"{}"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.decode()[:40],
)
def test_a_model_that_cannot_be_read_is_the_users(file: str, content: bytes, tmp_path: Path) -> None:
    """Transformers refuses each of these with an error of another class."""
    build_model("llama-nano", BYTES, 16, seed=3).save_pretrained(tmp_path)
    if file == "config.json":
        (tmp_path / "model.safetensors").unlink()
    elif file != "model.safetensors":
        (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match=r"cannot be loaded: .*presets are"):
        build_model(str(tmp_path), BYTES, 16, seed=0)


def test_a_fault_of_the_program_is_not_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong call of transformers must not be shown as a model that cannot be loaded."""
    build_model("llama-nano", BYTES, 16, seed=3).save_pretrained(tmp_path)
    monkeypatch.setattr(build.AutoModelForCausalLM, "from_pretrained", lambda name: None)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        build_model(str(tmp_path), BYTES, 16, seed=0)


def test_a_broken_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(InputError, match=r"cannot be loaded.*presets are"):
        build_model(str(tmp_path / "config.json"), BYTES, 16, seed=0)
