"""Tokenised documents in files that are kept, read as shuffled windows with an exact cursor."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from subspan.training.data.batches import Batch, Order
from subspan.training.data.documents import SPLITS, Documents, Piece, Split
from subspan.training.data.tokenizer import fingerprint
from subspan.utils.atomic_files import disk_error, no_space, remove_directory
from subspan.utils.errors import InputError
from subspan.utils.messages import say

_FORMAT = 5  # part of the cache's key: raise it when the files change

_TOGETHER, _CHARACTERS = 64, 2**22
"""Number of documents, and of their characters, that are tokenised at once."""


class TokenWindows:
    """Windows of ``sequence_length`` predictions, cut end to end from the documents of a part.

    Documents are joined by end-of-text tokens. The training windows come in the order of ``Order``. There need be no
    test part.
    """

    def __init__(self, folder: Path, sequence_length: int, seed: int, evaluation_tokens: int) -> None:
        self.length, self.evaluation_tokens = sequence_length, evaluation_tokens
        meta = _meta(folder)
        if meta is None:
            raise _damaged(folder)
        self.documents: dict[str, int] = meta["documents"]
        self.digest: str = meta["digest"]
        self._notes: list[str] = meta["notes"]
        self.form: str = meta["form"]
        parts = [part for part in SPLITS if self.documents[part] or part != "test"]
        self.parts = {part: TokenFile(folder / f"{part}.bin", meta["dtype"], meta["largest"]) for part in parts}
        for part, tokens in self.parts.items():
            if not self.documents[part]:
                raise InputError(
                    f"data: no document is left for the {part} part; a text file is one document, and is cut in two "
                    "only between paragraphs or lines: give more text, or other files as --validation_data"
                )
            if len(tokens) < sequence_length + 1:
                raise InputError(
                    f"sequence_length={sequence_length}: the {part} part of the data holds {len(tokens)} tokens in "
                    f"{self.documents[part]} documents, fewer than one sequence and its next token; "
                    "give more data, or a shorter sequence"
                )
        self.order = Order(self._count("train"), seed)

    def next_batch(self, size: int) -> Batch:
        return self._windows("train", self.order.take(size))

    def validation(self) -> Batch:
        return self._spread("validation")

    def test(self) -> Batch | None:
        return self._spread("test") if "test" in self.parts else None

    def state_dict(self) -> dict[str, Any]:
        return {**self.order.state_dict(), "digest": self.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["digest"] != self.digest:
            raise InputError(
                "data: the documents or the tokenizer have changed since the checkpoint; start again with another --out"
            )
        self.order.load_state_dict(state)

    def describe(self) -> str:
        sizes = [
            f"{len(tokens):,} {part} tokens (documents: {self.documents[part]})" for part, tokens in self.parts.items()
        ]
        return ", ".join(sizes)

    def notes(self) -> list[str]:
        return self._notes

    def _count(self, part: Split) -> int:
        return (len(self.parts[part]) - 1) // self.length

    def _spread(self, part: Split) -> Batch:
        """Return the fixed set of a part, taken evenly from all of it."""
        count = self._count(part)
        wanted = min(count, max(1, self.evaluation_tokens // self.length))
        return self._windows(part, torch.arange(wanted) * count // wanted)

    def _windows(self, part: Split, numbers: Tensor) -> Batch:
        tokens = self.parts[part]
        rows = [tokens[start : start + self.length + 1] for start in (numbers * self.length).tolist()]
        window = torch.from_numpy(np.stack(rows).astype(np.int64))
        return Batch(window[:, :-1], window[:, 1:])


def tokenise(documents: Documents, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Return the folder with a ``.bin`` file for each part and ``meta.json``, made once and kept in the cache.

    The cache is ``$SUBSPAN_CACHE`` or ``~/.cache/subspan``; its key covers the files and the tokenizer.
    """
    key = _key(documents, tokenizer)
    cache = Path(os.environ.get("SUBSPAN_CACHE", "~/.cache/subspan")).expanduser()
    folder = cache / hashlib.sha256(key.encode()).hexdigest()[:32]
    if _meta(folder) is not None:
        return folder
    scratch = None
    try:
        cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=cache, prefix="unfinished-"))
        _write(scratch, documents, tokenizer)
        if _key(documents, tokenizer) != key:
            raise InputError(
                "data: its files changed while they were read; start again when nothing writes to them any more"
            )
        if folder.exists() and _meta(folder) is None:
            say(f"{folder}: the cache of tokens there is damaged and is made again")
            remove_directory(folder)
        # Renamed when complete: a reader sees all of it or nothing. Where another process was first, its folder stands.
        if not folder.exists():
            scratch.rename(folder)
    except OSError as error:
        if _meta(folder) is None:
            if disk_error(error, cache) is None:
                raise
            # A token takes two bytes, and stands for more than a letter.
            needed = sum(size for _, size, _ in documents.identity()) * 2
            raise no_space(f"the cache of tokens {folder} (SUBSPAN_CACHE)", cache, error, needed) from error
    finally:
        if scratch:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _key(documents: Documents, tokenizer: PreTrainedTokenizerBase) -> str:
    columns = [documents.text_column, documents.encoding]
    return json.dumps([_FORMAT, documents.identity(), columns, fingerprint(tokenizer)])


class TokenFile:
    """The tokens of a part, read when they are asked for.

    It is no memory map: if someone shortens a file under a map, a signal (SIGBUS) ends the process without a word.
    """

    def __init__(self, path: Path, dtype: str, largest: int) -> None:
        self.path, self.dtype, self.largest = path, np.dtype(dtype), largest
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115  # open as long as the run; outlives its name
            self._length = path.stat().st_size // self.dtype.itemsize
        except OSError as error:
            raise _damaged(path, error.strerror) from error

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> Any:
        start, stop, _ = part.indices(self._length)
        wanted = (stop - start) * self.dtype.itemsize
        content = b""
        try:
            self._file.seek(start * self.dtype.itemsize)
            while len(content) < wanted and (more := self._file.read(wanted - len(content))):
                content += more
        except OSError as error:
            raise _damaged(self.path, error.strerror) from error
        if len(content) < wanted:
            raise _damaged(
                self.path, f"ends at token {start + len(content) // self.dtype.itemsize:,} of {self._length:,}"
            )
        tokens = np.frombuffer(content, self.dtype)
        if len(tokens) and int(tokens.max()) > self.largest:  # the model has no row for it
            raise _damaged(
                self.path, f"holds token {int(tokens.max()):,}, was written with none above {self.largest:,}"
            )
        return tokens


def _damaged(path: Path, reason: str | None = None) -> InputError:
    return InputError(
        f"the cache of tokens {path} is damaged{f': {reason}' if reason else ''}; "
        "start again with --resume auto, and what can be seen to be damaged is made again; else remove its folder first"
    )


def _meta(folder: Path) -> dict[str, Any] | None:
    """Return what ``meta.json`` says of a complete cache, or ``None`` if there is none or it is damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        sizes = {part: (folder / f"{part}.bin").stat().st_size for part in SPLITS}
        whole = sizes == meta["bytes"] and {"documents", "digest", "dtype", "largest", "notes", "form"} <= meta.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return meta if whole else None


def _write(folder: Path, documents: Documents, tokenizer: PreTrainedTokenizerBase) -> None:
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
    counts, sizes = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    digest, largest = hashlib.sha256(), 0
    with ExitStack() as stack:
        files = {part: stack.enter_context(open(folder / f"{part}.bin", "wb")) for part in SPLITS}
        for some in _chunks(documents.pieces()):
            encoded = tokenizer([piece.text for piece in some], add_special_tokens=False, return_attention_mask=False)[
                "input_ids"
            ]
            for (part, _, ends), ids in zip(some, encoded, strict=True):
                content = np.asarray([*ids, tokenizer.eos_token_id] if ends else ids, dtype=dtype).tobytes()
                files[part].write(content)
                digest.update(part.encode() + content)
                counts[part] += ends
                sizes[part] += len(content)
                largest = max(largest, *ids, tokenizer.eos_token_id)
    if not any(counts.values()):
        raise InputError(f"data: {documents.names()}: holds no text; every file there is empty; give other files")
    meta = {
        "dtype": dtype.name,
        "largest": largest,
        "documents": counts,
        "bytes": sizes,
        "digest": digest.hexdigest(),
        "notes": documents.notes,
        "form": "; ".join(documents.forms),
    }
    (folder / "meta.json").write_text(json.dumps(meta))


def _chunks(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Yield pieces together, as many as a tokenizer takes at once without much memory."""
    some: list[Piece] = []
    for piece in pieces:
        some.append(piece)
        if len(some) == _TOGETHER or sum(len(own.text) for own in some) > _CHARACTERS:
            yield some
            some = []
    if some:
        yield some
