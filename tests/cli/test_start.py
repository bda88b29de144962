"""The command line answers without torch where it computes nothing: importing torch takes seconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import subspan
from subspan.cli.main import COMMANDS

PROGRAM = """
import sys
from subspan.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    status = end.code
loaded = [name for name in ("torch", "transformers", "numpy") if name in sys.modules]
assert not loaded, loaded
sys.exit(status)
"""


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--help"], 0, "Train large language models"),
        (["--version"], 0, "subspan"),
        *[([name, "--help"], 0, "usage:") for name in COMMANDS if name not in ("bench", "theory")],
        (["pretrian"], 2, "did you mean pretrain?"),
        (["pretrain", "--optimzer", "adamw"], 2, "did you mean"),
        (["plan", "--modle", "llama-7b"], 2, "did you mean model"),
        (["plan"], 2, "model"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_no_torch(words: list[str], status: int, said: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(subspan.__file__).parents[1])}
    ended = subprocess.run([sys.executable, "-c", PROGRAM, *words], env=env, capture_output=True, text=True)
    assert ended.returncode == status, ended.stderr
    assert said in ended.stdout + ended.stderr
