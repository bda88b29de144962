"""What holds for every test: one thread, for results must not depend on the machine, and nothing of the user's."""

import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before its import: no test may reach a hub, or wait for one

import hypothesis
import pytest
import torch
from support.small_runs import documents

torch.set_num_threads(1)
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")  # a busy one takes its time


INHERITED = ("SUBSPAN_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "COLUMNS", "NO_COLOR", "FORCE_COLOR")
"""How variables begin that change what the command does or prints."""


@pytest.fixture(autouse=True, scope="session")
def _environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Takes away what the tests might inherit, and gives each worker a cache of tokens of its own."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(INHERITED)]:
            patch.delenv(name)
        patch.setenv("SUBSPAN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _signals() -> Iterator[None]:
    """Sets SIGINT and SIGTERM to their defaults, for the tests and what they start. A shell that starts a command with
    ``&`` has it ignore SIGINT, and so would all its children.
    """
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    ignored = [signum for signum in defaults if signal.getsignal(signum) is signal.SIG_IGN]
    for signum in ignored:
        signal.signal(signum, defaults[signum])
    yield
    for signum in ignored:
        signal.signal(signum, signal.SIG_IGN)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Forty short documents in one JSONL file."""
    return documents(tmp_path / "corpus.jsonl")


@pytest.fixture
def one_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives the command a parser that is there, for tests which call it often and are not about the parser."""
    from support import parsers

    module = sys.modules[parsers.make_parser.__module__]  # whose name in its package is that of a function
    monkeypatch.setattr(module, "make_parser", lambda only=None: parsers.PARSER)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Seeds what a test draws without a generator of its own: it must not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _log_level() -> Iterator[None]:
    """Restores the level of the library's log, which the command changes: the next test must not find it quiet."""
    own = logging.getLogger("subspan")
    own.setLevel(logging.NOTSET)
    yield
    own.setLevel(logging.NOTSET)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start several processes run one after another."""
    for item in items:
        if item.get_closest_marker("distributed"):
            item.add_marker(pytest.mark.xdist_group("processes"))
