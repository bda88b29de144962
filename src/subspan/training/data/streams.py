"""C4 and SlimPajama, streamed through ``datasets`` and tokenised on the way, with an exact cursor.

Documents come in stored order: C4's files are shuffled already, and a shuffle buffer could not be restored exactly.
GaLore's code takes one document for each sequence, cut or padded; that is ``packing=False``. Every process reads and
tokenises all of the stream and keeps its share of every batch. So a run can go on with another number of processes.
"""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from subspan.training.data.batches import IGNORED, Batch
from subspan.utils.errors import FAULTS, InputError, named


@dataclass(frozen=True)
class _Dataset:
    hub: tuple[str, ...]
    """Arguments of ``datasets.load_dataset``."""
    files: dict[str, str]
    """Patterns of the data set's own file names, under a local copy."""


STREAMS = {
    "c4": _Dataset(("allenai/c4", "en"), {"train": "**/c4-train*.json*", "validation": "**/c4-validation*.json*"}),
    "slimpajama": _Dataset(
        ("cerebras/SlimPajama-627B",), {"train": "train/**/*.jsonl*", "validation": "validation/**/*.jsonl*"}
    ),
}


class TokenStream:
    """Sequences from a streamed data set.

    Args:
        data: ``c4`` or ``slimpajama`` from the hub, or ``c4:PATH`` for a local copy of its files.
        tokenizer: the model's tokenizer, which has an end-of-text token.
        sequence_length: predictions of a sequence.
        validation_tokens: tokens of the validation set.
        packing: whether to join documents with end-of-text tokens and cut the result. If not, each sequence is one
            document, cut or padded.
    """

    def __init__(
        self, data: str, tokenizer: PreTrainedTokenizerBase, sequence_length: int, validation_tokens: int, packing: bool
    ) -> None:
        self.data, self.tokenizer, self.length, self.packing = data, tokenizer, sequence_length, packing
        # The files as they were when it began, and how many have been read since.
        self._files, self._read = _sizes(data, "train"), 0
        self._train = _load(data, "train")
        self._beginning = copy.deepcopy(self._train.state_dict())
        self._documents: Iterator[str] | None = None
        self._left: list[int] = []  # tokens of the current document that have not been used yet
        self._validation = self._fixed_set(validation_tokens)

    def next_batch(self, size: int) -> Batch:
        return self._batch([self._next_sequence() for _ in range(size)])

    def validation(self) -> Batch:
        return self._validation

    def test(self) -> None:
        """There is no test part: these data sets have two halves."""

    def state_dict(self) -> dict[str, Any]:
        return {"stream": self._train.state_dict(), "left": list(self._left), "files": self._files}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        now = _sizes(self.data, "train")
        before = state.get("files", now)  # a cursor into other files points anywhere
        self._check(sorted({**before, **now}), before, "since the checkpoint")
        self._train.load_state_dict(state["stream"])
        self._files, self._read = now, 0
        self._left, self._documents = list(state["left"]), None

    def _check(self, names: Iterable[str], before: dict[str, int], since: str) -> None:
        """Raise an error unless the files of these names are as long as they were ``before``."""
        now = _sizes(self.data, "train")
        for name in names:
            if before.get(name) != now.get(name):
                sizes = [f"{files[name]:,} bytes" if name in files else "absent" for files in (before, now)]
                raise InputError(
                    f"data {self.data!r}: {name} has changed {since} ({sizes[0]}, now {sizes[1]}); "
                    "put it back and continue with --resume auto, or start again with another --out"
                )

    def describe(self) -> str:
        return f"{self.data}, streamed; {self._validation.tokens():,} validation tokens"

    def notes(self) -> list[str]:
        return []

    def _next_sequence(self) -> list[int]:
        """Return the next ``length + 1`` tokens; without packing there may be fewer."""
        if not self.packing:
            return self._encode(self._next_document())[: self.length + 1]
        while len(self._left) < self.length + 1:
            self._left += self._encode(self._next_document())
        sequence = self._left[: self.length + 1]
        del self._left[: self.length]  # the last token is predicted here and starts the next sequence
        return sequence

    def _next_document(self) -> str:
        if self._documents is None:
            self._documents = _texts(self._train, self.data)
        text = next(self._documents, None)
        self._check_read(len(self._files) if text is None else _finished(self._train.state_dict()))
        # The next epoch is begun by hand: a restored stream would start again where it was restored.
        if text is None:
            self._train.load_state_dict(copy.deepcopy(self._beginning))
            self._read = 0
            self._documents = _texts(self._train, self.data)
            text = next(self._documents, None)
            if text is None:
                raise InputError(f"data {self.data!r}: its train half holds no text; give other files")
        return text

    def _check_read(self, done: int) -> None:
        """Raise an error if one of the ``done`` files has ended too early.

        A file that is cut between two lines reads like a shorter one.
        """
        if done > self._read:
            self._check(list(self._files)[self._read : done], self._files, "while it was read")
            self._read = done

    def _encode(self, text: str) -> list[int]:
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]

    def _batch(self, sequences: list[list[int]]) -> Batch:
        rows = torch.full((len(sequences), self.length + 1), IGNORED)
        for row, sequence in zip(rows, sequences, strict=True):
            row[: len(sequence)] = torch.tensor(sequence)
        # Behind the end of a document the inputs do not matter: attention is causal and the targets are ignored.
        return Batch(rows[:, :-1].masked_fill(rows[:, :-1] == IGNORED, self.tokenizer.eos_token_id), rows[:, 1:])

    def _fixed_set(self, tokens: int) -> Batch:
        sequences: list[list[int]] = []
        joined: list[int] = []
        for text in _texts(_load(self.data, "validation"), self.data):
            ids = self._encode(text)
            if self.packing:
                joined += ids
            elif len(ids) > 1:
                sequences.append(ids[: self.length + 1])
            if len(joined) + sum(map(len, sequences)) > tokens + self.length:
                break
        sequences += [joined[i : i + self.length + 1] for i in range(0, min(tokens, len(joined) - 1), self.length)]
        if not sequences:
            raise InputError(f"data {self.data!r}: its validation half holds no text")
        return self._batch(sequences)


def _texts(dataset: Any, data: str) -> Iterator[str]:
    known = STREAMS[data.partition(":")[0]].hub[0]

    def unreadable(reason: str) -> InputError:
        return InputError(f'data {data!r}: {reason}; expected readable rows with a "text", as in {known}')

    rows = iter(dataset)
    while True:
        try:
            row = next(rows, None)
        except MemoryError:
            raise
        except Exception as error:  # only the readers of datasets run here, and they raise errors of a dozen kinds
            raise unreadable(named(error)) from error
        if row is None:
            return
        if not isinstance(row.get("text"), str):
            raise unreadable(
                f'a row has {row["text"]!r:.40} as its "text"' if "text" in row else f"a row has only {', '.join(row)}"
            )
        yield row["text"]


def _load(data: str, half: str) -> Any:
    import datasets  # seconds to import, and only streams need it

    name, _, path = data.partition(":")
    known = STREAMS[name]
    place: tuple[str, ...] = known.hub
    files = None
    if path:
        files = [str(file) for file in _files(path, known.files[half])]
        if not files:
            raise InputError(
                f"data {data!r}: no {known.files[half]} under {path}; expected a copy of {known.hub[0]}'s files"
            )
        place = ("json",)
    try:
        return datasets.load_dataset(*place, data_files=files and {half: files}, split=half, streaming=True)
    except FAULTS:
        raise
    except Exception as error:  # the hub's client raises errors of a dozen kinds
        remedy = "mend or remove that file" if path else f"without a network give a local copy as {name}:PATH"
        raise InputError(f"data {data!r} cannot be opened: {named(error)}; {remedy}") from error


def _finished(state: Any) -> int:
    """Return how many files a stream in this state has read to the end.

    After a resume ``datasets`` counts one file too few.
    """
    own = state.get("shard_idx", 0)
    return max([own, *(_finished(value) for value in state.values() if isinstance(value, dict))])


def _files(path: str, pattern: str) -> list[Path]:
    return sorted(Path(path).expanduser().glob(pattern), key=str)


def _sizes(data: str, half: str) -> dict[str, int]:
    """Return the bytes of the files of a local copy by name; there are none for the hub."""
    name, _, path = data.partition(":")
    return {file.name: file.stat().st_size for file in _files(path, STREAMS[name].files[half])} if path else {}
