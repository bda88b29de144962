"""One text, or one that outweighs all others, is cut near its end; a very long one is read in pieces."""

import json
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from subspan.training.data import pieces
from subspan.training.data.documents import Documents, find_documents
from subspan.training.data.pieces import cut_near_end
from subspan.training.data.token_cache import tokenise
from subspan.training.data.tokenizer import load_tokenizer
from subspan.utils.errors import InputError


def prose(paragraphs: int, seed: int = 0, between: str = "\n\n") -> str:
    draw = random.Random(seed)
    return between.join(f"paragraph {i} " + " ".join(draw.choices("abcdefg", k=40)) for i in range(paragraphs))


def halves(documents: Documents) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"train": [], "validation": []}
    for half, text in documents.split():
        found.setdefault(half, []).append(text)
    return found


@pytest.mark.parametrize(
    ("between", "unit"), [("\n\n", "paragraph"), ("\n \n", "paragraph"), ("\n", "line"), (" ", "word")]
)
@pytest.mark.parametrize("name", ["input.txt", "input.jsonl"])
def test_the_last_twentieth_is_validation(name: str, between: str, unit: str, tmp_path: Path) -> None:
    """It begins with a paragraph; without paragraphs with a line, and without lines with a word. Nothing is lost."""
    text = prose(200, between=between)
    (tmp_path / name).write_text(json.dumps({"text": text}) if name.endswith("jsonl") else text)
    documents = find_documents(str(tmp_path / name))
    found = halves(documents)
    (train,), (held,) = found["train"], found["validation"]
    assert train + held == text
    assert 0.045 < len(held) / len(text) < 0.055
    assert unit == "word" or held.startswith("paragraph 190 ")
    assert train[-1].isspace()
    assert not held[0].isspace()
    assert documents.notes == [
        f"data: a single text outweighs all others; its last {len(held) / len(text):.1%}, from the beginning of a {unit} "
        "on, are the validation part (--validation_data names other files)"
    ]


def test_the_cut_is_the_paragraph_nearest_to_the_twentieth() -> None:
    """It is compared with all places where a paragraph begins."""
    draw = random.Random(1)
    for _ in range(20):
        parts = ["x" * draw.randint(1, 90) for _ in range(120)]
        text = "\n\n".join(parts)
        places = [len("\n\n".join(parts[:i])) + 2 for i in range(1, len(parts))]
        best = min(places, key=lambda place: abs(place - 0.95 * len(text)))
        cut = cut_near_end([text], len(text), 0.05)
        assert cut is not None
        assert cut == (best, "paragraph")


@pytest.mark.parametrize("text", ["short", "one line " * 100])
def test_what_cannot_be_cut_is_refused_with_the_way_out(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text)
    assert halves(find_documents(str(tmp_path / "a.txt"))) == {"train": [text], "validation": []}


def test_two_texts_of_very_different_size(tmp_path: Path) -> None:
    """The large one never is the validation part, whatever the hashes say."""
    for seed in range(6):
        large, small = prose(300, seed), prose(9, seed + 100)
        (tmp_path / "large.txt").write_text(large)
        (tmp_path / "small.txt").write_text(small)
        assert halves(find_documents(str(tmp_path))) == {"train": [large], "validation": [small]}


def test_a_text_too_small_to_measure_on(tmp_path: Path) -> None:
    """Where the others would make less than a hundredth of the text, the large one is cut, and they are trained on."""
    for seed in range(6):
        large, small = prose(900, seed), f"a few words {seed}"
        (tmp_path / "large.txt").write_text(large)
        (tmp_path / "small.txt").write_text(small)
        found = halves(find_documents(str(tmp_path)))
        assert sorted(found["train"], key=len)[0] == small
        assert max(found["train"], key=len) + found["validation"][0] == large
        assert len(found["validation"]) == 1


def test_one_large_document_among_many(tmp_path: Path) -> None:
    for seed in range(6):
        texts = [prose(400, seed), *(prose(2, 1000 * seed + i) for i in range(1, 100))]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        found = halves(find_documents(str(tmp_path / "a.jsonl")))
        assert len(found["validation"]) == 5
        assert texts[0] in found["train"]


def test_own_validation_files_leave_the_text_whole(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(100))
    (tmp_path / "held.txt").write_text("to measure on")
    found = halves(find_documents(str(tmp_path / "a.txt"), str(tmp_path / "held.txt")))
    assert found == {"train": [prose(100)], "validation": ["to measure on"]}


# --- very long texts --------------------------------------------------------------------------------------------------


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "LONGEST", 3000)
    monkeypatch.setattr(pieces, "PIECE", 1000)


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("between", ["\n\n", "\n", " "])
def test_pieces_make_the_text(between: str, tmp_path: Path) -> None:
    """In pieces a text has the same parts as whole, and the same tokens of bytes, in which a document ends once."""
    texts = {"long.txt": prose(100, 0, between), "b.txt": prose(30, 1, between), "c.txt": prose(29, 2, between)}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    documents = find_documents(str(tmp_path))
    found = list(documents.pieces())
    assert max(len(piece.text) for piece in found) <= 3000
    assert sum(piece.ends for piece in found) == 3
    assert sorted(text for half in halves(documents).values() for text in half) == sorted(texts.values())
    folder = tokenise(documents, load_tokenizer("bytes"))
    read = [np.fromfile(folder / f"{part}.bin", dtype=np.uint16) for part in ("train", "validation")]
    whole = [bytes(t.astype(np.uint8)) for tokens in read for t in np.split(tokens, np.flatnonzero(tokens == 256))]
    assert sorted(own.lstrip(b"\x00").decode() for own in whole if own.strip(b"\x00")) == sorted(texts.values())


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("between", ["\n\n", "\n"])
def test_a_long_text_is_cut_where_it_is_when_whole(between: str, tmp_path: Path) -> None:
    text = prose(200, 0, between)
    (tmp_path / "a.txt").write_text(text)
    documents = find_documents(str(tmp_path / "a.txt"))
    (train,), (held,) = halves(documents).values()
    assert train + held == text
    place = cut_near_end([text], len(text), 0.05)
    assert place is not None
    assert len(train) == place.place


@pytest.mark.usefixtures("short_pieces")
def test_a_long_text_is_not_held_in_memory(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(20_000))
    size = (tmp_path / "a.txt").stat().st_size
    list(find_documents(str(tmp_path / "a.txt")).pieces())  # what is made once
    tracemalloc.start()
    for _ in find_documents(str(tmp_path / "a.txt")).pieces():
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size / 5


@pytest.mark.usefixtures("short_pieces")
def test_bytes_that_are_no_text_far_into_a_file_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(prose(400, between="\n").encode() + b"\nand \xff\n")
    with pytest.raises(InputError, match=r"a\.txt cannot be read: line 401: .*--encoding latin-1"):
        list(find_documents(str(tmp_path / "a.txt")).pieces())
