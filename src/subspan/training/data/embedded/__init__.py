"""Files that ship with the package; README.md beside them says what they are and where they come from."""

from pathlib import Path

CORPUS = Path(__file__).parent / "corpus.jsonl.xz"
BPE = Path(__file__).parent / "bpe-4096.json"
