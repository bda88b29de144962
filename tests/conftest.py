"""One thread: the matrices here are small, and results must not depend on the machine. And what runs of all kinds
read.
"""

import logging
import os
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
