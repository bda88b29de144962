"""The code on a page: its Python, run block after block as a reader would type it, and its commands, as arguments."""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def module_of(name: str) -> ModuleType:
    """A file of tests, imported by its path below ``tests``: its folder may be named as a module of Python's is."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / "tests" / name)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python_blocks(page: str) -> list[str]:
    """Those that are to be run; one that cannot be, on one process and without a network, is
    marked ``python notest``.
    """
    return re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


def run(blocks: list[str], names: dict[str, object], where: str) -> Iterator[str]:
    """Run each with ``names`` for its globals, and yield it once it has run."""
    for block in blocks:
        exec(compile(block, where, "exec"), names)
        yield block


def commands(page: str) -> list[list[str]]:
    """The arguments of each ``subspan`` in a block of shell, torchrun's included."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    split = [shlex.split(line, comments=True) for line in lines if re.search(r"(^|-m )subspan ", line)]
    whole = [words[words.index("subspan") + 1 :] for words in split]
    return [list(takewhile(lambda word: word not in (">", "|", "&&"), words)) for words in whole]
