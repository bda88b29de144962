"""C4 and SlimPajama from local files of the same form: names, compression, fields."""

import gzip
import json
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import zstandard

from subspan.training.data.batches import IGNORED
from subspan.training.data.streams import TokenStream
from subspan.training.data.tokenizer import load_tokenizer
from subspan.utils.errors import InputError

TOKENIZER = load_tokenizer("bytes")
TEXTS = [f"document {i} " + "x" * (i * 7 % 40) for i in range(30)]


@pytest.fixture(scope="module")
def c4(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("c4") / "en"
    folder.mkdir()
    files = {
        "c4-train.00000-of-01024": TEXTS[:12],
        "c4-train.00001-of-01024": TEXTS[12:24],
        "c4-validation.00000-of-00008": TEXTS[24:],
    }
    for name, texts in files.items():
        with gzip.open(folder / f"{name}.json.gz", "wt") as file:
            for text in texts:
                file.write(json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "http://x"}) + "\n")
    return f"c4:{folder.parent}"


def stream(data: str, length: int = 10, tokens: int = 60, packing: bool = True) -> TokenStream:
    return TokenStream(data, TOKENIZER, length, tokens, packing)


def test_packed_sequences_are_the_documents_end_to_end(c4: str) -> None:
    data = stream(c4)
    joined = [token for text in TEXTS[:24] for token in [*text.encode(), 256]]
    rows = data.next_batch(20)
    for i in range(20):
        assert rows.inputs[i].tolist() == joined[10 * i : 10 * i + 10]
        assert rows.targets[i].tolist() == joined[10 * i + 1 : 10 * i + 11]


def test_unpacked_sequences_are_documents(c4: str) -> None:
    """Each sequence is one document, cut to the length or padded; padding is neither a target nor a token."""
    batch = stream(c4, length=20, packing=False).next_batch(24)
    for row, targets, text in zip(batch.inputs, batch.targets, TEXTS[:24], strict=True):
        ids = [*text.encode(), 256][:21]
        assert row.tolist()[: len(ids) - 1] == ids[:-1]
        assert targets.tolist() == ids[1:] + [IGNORED] * (20 - len(ids) + 1)
    assert batch.tokens() == sum(min(len(text) + 1, 21) - 1 for text in TEXTS[:24])
    assert int(batch.inputs.min()) >= 0


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("taken", [1, 5, 23, 60])
def test_the_cursor_is_exact(taken: int, packing: bool, c4: str) -> None:
    """The cursor is exact past the first epoch too, and through a file as a checkpoint would keep it."""
    data = stream(c4, packing=packing)
    data.next_batch(taken)
    state = json.loads(json.dumps(data.state_dict()))
    restored = stream(c4, packing=packing)
    restored.load_state_dict(state)
    for size in (1, 4, 40):
        assert torch.equal(data.next_batch(size).targets, restored.next_batch(size).targets)


@pytest.mark.parametrize("packing", [True, False])
def test_the_validation_set_is_fixed(packing: bool, c4: str) -> None:
    first, second = stream(c4, packing=packing), stream(c4, packing=packing)
    second.next_batch(7)
    assert torch.equal(first.validation().targets, second.validation().targets)
    assert 50 <= first.validation().tokens() <= 80
    # Packed targets are the validation documents' own tokens, once each.
    if packing:
        joined = [token for text in TEXTS[24:] for token in [*text.encode(), 256]]
        assert first.validation().targets.flatten().tolist() == joined[1:61]


def test_slimpajama(tmp_path: Path) -> None:
    for half, texts in (("train", TEXTS[:20]), ("validation", TEXTS[20:])):
        folder = tmp_path / half / "chunk1"
        folder.mkdir(parents=True)
        rows = "".join(json.dumps({"text": t, "meta": {"redpajama_set_name": "RedPajamaC4"}}) + "\n" for t in texts)
        (folder / "example_0.jsonl.zst").write_bytes(zstandard.compress(rows.encode()))
    data = stream(f"slimpajama:{tmp_path}")
    assert data.next_batch(1).inputs[0].tolist() == list(TEXTS[0].encode()[:10])


def test_no_files_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data 'c4:.*no .*c4-train.* under"):
        stream(f"c4:{tmp_path}")


@pytest.mark.parametrize(("line", "words"), [('{"body": "x"}', "a row has only body"), ("{broken", "JSON parse error")])
def test_rows_that_cannot_be_read(line: str, words: str, tmp_path: Path) -> None:
    for half in ("train", "validation"):
        with gzip.open(tmp_path / f"c4-{half}.00000-of-00001.json.gz", "wt") as file:
            file.write(line + "\n")
    with pytest.raises(InputError, match=rf'{words}.*expected readable rows with a "text"'):
        stream(f"c4:{tmp_path}")


@pytest.mark.parametrize("error", [TypeError("an unexpected keyword"), MemoryError()])
def test_a_fault_is_not_the_users(error: Exception, c4: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> NoReturn:
        raise error

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(type(error)) as caught:
        stream(c4)
    assert caught.value is error
