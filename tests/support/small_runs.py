"""Documents and settings of pretraining runs that take a second or less."""

from pathlib import Path

from subspan.training.config.settings import PretrainConfig


def documents(path: Path) -> Path:
    """Forty short documents in one JSONL file."""
    path.write_text("".join(f'{{"text": "document {i}: {"the quick brown fox " * (5 + i)}"}}\n' for i in range(40)))
    return path


def config(data: Path, out: Path, /, **settings: object) -> PretrainConfig:
    """On one thread of the CPU, of rank 4, with 16 tokens a sequence; ``settings`` say the rest, or otherwise."""
    common: dict[str, object] = {"rank": 4, "sequence_length": 16, "threads": 1, "device": "cpu"}
    return PretrainConfig(**{**common, "data": str(data), "out": str(out), **settings})  # type: ignore[arg-type]
