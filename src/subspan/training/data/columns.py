"""Which columns of a file hold what: found by their usual names, and said in one line."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

from subspan.training.data.records import Record

LOOKED_AT = 64
"""Number of records at the beginning of a file that decide what its columns hold."""
TEXTS = (
    "text", "content", "body", "document", "article", "story", "passage", "paragraph", "sentence", "abstract", "review",
    "comment", "description", "transcript", "code", "markdown", "raw_content", "page_content", "tweet", "message", "summary",
)  # fmt: skip
"""Names of a text that stands for itself, the first of which that is there is taken."""
CHATS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns", "chosen")
PROMPTS = ("instruction", "prompt", "question", "query", "problem", "input", "user", "human")
INPUTS = ("input", "inputs", "context")
"""Names of what an instruction is about."""
ANSWERS = (
    "output", "outputs", "completion", "answer", "response", "target", "reply", "solution", "assistant", "chosen",
    "label",
)  # fmt: skip
SYSTEMS = ("system", "system_prompt")
LABELS = ("label", "labels", "class", "category", "target", "sentiment", "topic", "intent", "stars", "rating")
SCORES = ("label", "score", "target", "rating", "value", "stars")
_WORDS = 5
"""From so many words on average, a column that is not used counts as one of text."""


def looked_at(records: Iterator[Record]) -> tuple[list[Record], Iterator[Record]]:
    """Return the records at the beginning, and all records."""
    first = list(islice(records, LOOKED_AT))
    return first, chain(first, records)


def first_of(names: Sequence[str], known: Mapping[str, Any]) -> str | None:
    """Return the column of ``known`` that has the first of these ``names``, written large or small."""
    plain = {name.strip().casefold(): name for name in reversed(list(known))}
    return next((plain[name] for name in names if name in plain), None)


def samples(records: Iterable[Record]) -> dict[str, list[Any]]:
    """Return the cells of each column that are not empty. A column that is empty everywhere has none."""
    found: dict[str, list[Any]] = {}
    for record in records:
        for name, value in record.values.items():
            cells = found.setdefault(str(name), [])
            if value is not None and value != "":
                cells.append(value)
    return found


def texts_of(cells: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Return the columns of which most cells are texts. A cell that is none is named when it is read."""
    found = {name: [cell for cell in own if isinstance(cell, str)] for name, own in cells.items()}
    return {name: own for name, own in found.items() if own and 2 * len(own) >= len(cells[name])}


def find_text(cells: Mapping[str, list[Any]]) -> str | None:
    """Return the column of a text that stands for itself: one of the usual names, or the only one of text."""
    texts = texts_of(cells)
    named = first_of(TEXTS, texts)
    if named is not None:
        return named
    long = [name for name, own in texts.items() if _is_prose(own)] or list(texts)
    return long[0] if len(long) == 1 else None


def unused_texts(cells: Mapping[str, list[Any]], used: Iterable[str | None]) -> list[str]:
    """Return the columns of text that are not used."""
    taken = set(used)
    return [name for name, own in texts_of(cells).items() if name not in taken and _is_prose(own)]


def _is_prose(cells: Sequence[str]) -> bool:
    return sum(len(cell.split()) for cell in cells) >= _WORDS * len(cells)
