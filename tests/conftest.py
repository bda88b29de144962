"""What holds for every test: one thread, for results must not depend on the machine, and nothing of the user's."""

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before its import: no test may reach a hub, or wait for one

import pytest
import torch
from support.small_runs import documents

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def token_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of tokens for each worker, and none of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUBSPAN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c() -> Iterator[None]:
    """SIGINT at its default, for the tests and what they start: a shell that starts a command with ``&`` ignores it."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Forty short documents in one JSONL file."""
    return documents(tmp_path / "corpus.jsonl")


@pytest.fixture(autouse=True)
def _log_level() -> Iterator[None]:
    """The command quiets the library's log; the next test of the process must not find it so."""
    own = logging.getLogger("subspan")
    own.setLevel(logging.NOTSET)
    yield
    own.setLevel(logging.NOTSET)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start several processes run one after another, with time for a machine whose cores are shared."""
    for item in items:
        if item.get_closest_marker("distributed"):
            item.add_marker(pytest.mark.xdist_group("processes"))
            if not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(900))
