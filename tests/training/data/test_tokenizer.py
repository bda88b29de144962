"""Tokenizers: what goes in comes out, and each saves with a model."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from subspan.training.data.tokenizer import fingerprint, load_tokenizer
from subspan.utils.errors import InputError

BYTES = load_tokenizer("bytes")
EMBEDDED = load_tokenizer("embedded")


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_are_the_utf8_bytes(text: str) -> None:
    assert BYTES(text)["input_ids"] == list(text.encode())
    assert BYTES.decode(BYTES(text)["input_ids"]) == text


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_the_embedded_bpe_round_trips(text: str) -> None:
    assert EMBEDDED.decode(EMBEDDED(text)["input_ids"]) == text


def test_sizes() -> None:
    assert (len(BYTES), len(EMBEDDED)) == (257, 4096)
    assert BYTES.eos_token_id == 256
    ids = EMBEDDED("It is a truth universally acknowledged")["input_ids"]
    assert len(ids) < 12  # it has learnt English: a third of the bytes and fewer


@pytest.mark.parametrize("tokenizer", [BYTES, EMBEDDED])
def test_saved_ones_load_as_the_same(tokenizer: object, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)  # type: ignore[attr-defined]
    for again in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        assert again("Hätte, 漢字 & <eos>?")["input_ids"] == tokenizer("Hätte, 漢字 & <eos>?")["input_ids"]  # type: ignore[operator]


def test_fingerprints_tell_tokenizers_apart() -> None:
    assert fingerprint(BYTES) == fingerprint(load_tokenizer("bytes")) != fingerprint(EMBEDDED)


@pytest.mark.parametrize("content", ["", "[]", "null", '{"version": "1.0", "model": 5}', '{"truncation": 5}'])
def test_a_damaged_file_is_named(content: str, tmp_path: Path) -> None:
    """Each is refused with an error of another class, some with a bare ``Exception``."""
    EMBEDDED.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=r"tokenizer .* cannot be loaded: .*; give 'bytes'"):
        load_tokenizer(str(tmp_path))


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer .*nothing-here.* cannot be loaded.*'bytes'"):
        load_tokenizer(str(tmp_path / "nothing-here"))
