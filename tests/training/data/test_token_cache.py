"""Windows of the tokens: every token once an epoch, and a cursor that is exact."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from subspan.training.data.documents import find_documents
from subspan.training.data.token_cache import TokenWindows, tokenise
from subspan.training.data.tokenizer import load_tokenizer
from subspan.utils.errors import InputError

LENGTH = 16


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer("bytes")


def windows(
    corpus: Path, tokenizer: PreTrainedTokenizerBase, length: int = LENGTH, seed: int = 0, tokens: int = 64
) -> TokenWindows:
    return TokenWindows(tokenise(find_documents(str(corpus)), tokenizer), length, seed, tokens)


def test_the_file_is_the_documents(corpus: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Each half holds its documents in order, each followed by the end of text."""
    data = windows(corpus, tokenizer)
    for half in ("train", "validation"):
        texts = [text for part, text in find_documents(str(corpus)).split() if part == half]
        expected = [token for text in texts for token in [*text.encode(), 256]]
        assert data.parts[half][:].tolist() == expected


def test_an_epoch_sees_every_window_once(corpus: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    data = windows(corpus, tokenizer)
    stream, count = data.parts["train"], (len(data.parts["train"]) - 1) // LENGTH
    seen = [tuple(row) for _ in range(count) for row in data.next_batch(1).inputs.tolist()]
    assert sorted(seen) == sorted(tuple(stream[i * LENGTH : (i + 1) * LENGTH].tolist()) for i in range(count))
    assert (data.order.epoch, data.order.index) == (1, 0)
    again = [tuple(row) for _ in range(count) for row in data.next_batch(1).inputs.tolist()]
    assert again != seen
    assert sorted(again) == sorted(seen)


def test_targets_are_the_next_tokens(corpus: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    batch = windows(corpus, tokenizer).next_batch(3)
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    assert batch.tokens() == 3 * LENGTH


def test_batches_cross_epochs_whole(corpus: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """A batch larger than what is left, or than a whole epoch, still has its size."""
    data = windows(corpus, tokenizer)
    count = (len(data.parts["train"]) - 1) // LENGTH
    assert len(data.next_batch(2 * count + 3).inputs) == 2 * count + 3
    assert (data.order.epoch, data.order.index) == (2, 3)


@pytest.mark.parametrize("taken", [0, 1, 7, 1000])
def test_the_cursor_is_exact(taken: int, corpus: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    data = windows(corpus, tokenizer)
    if taken:
        data.next_batch(taken)
    state = data.state_dict()
    restored = windows(corpus, tokenizer)
    restored.load_state_dict(state)
    for size in (1, 5, 300):
        assert torch.equal(data.next_batch(size).inputs, restored.next_batch(size).inputs)


def test_the_seed_sets_the_order(corpus: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    first, same, other = (windows(corpus, tokenizer, seed=seed).next_batch(20).inputs for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_the_validation_set_is_fixed_and_spread(corpus: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    small, whole = (windows(corpus, tokenizer, seed=seed, tokens=tokens) for seed, tokens in ((1, 64), (2, 10**9)))
    rows = [tuple(row) for row in small.validation().inputs.tolist()]
    every = [tuple(row) for row in whole.validation().inputs.tolist()]
    assert len(rows) == 64 // LENGTH
    assert len(every) == (len(whole.parts["validation"]) - 1) // LENGTH
    assert set(rows) <= set(every)
    assert torch.equal(small.validation().inputs, windows(corpus, tokenizer, seed=9).validation().inputs)


def test_the_cache_follows_files_and_tokenizer(corpus: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    folder = tokenise(find_documents(str(corpus)), tokenizer)
    assert tokenise(find_documents(str(corpus)), tokenizer) == folder
    assert tokenise(find_documents(str(corpus)), load_tokenizer("embedded")) != folder
    corpus.write_text(corpus.read_text() + '{"text": "one more"}\n')
    assert tokenise(find_documents(str(corpus)), tokenizer) != folder
    assert not list(folder.parent.glob("unfinished-*"))


def test_too_long_a_sequence(corpus: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match=r"sequence_length=10000: the validation part .* holds \d+ tokens"):
        windows(corpus, tokenizer, length=10_000)


def test_one_document_cannot_be_split(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "only.txt").write_text("all alone " * 100)
    with pytest.raises(InputError, match="no document is left for the validation part; a text file is one document"):
        windows(tmp_path, tokenizer)
