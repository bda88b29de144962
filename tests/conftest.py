"""One thread: the matrices here are small, and results must not depend on the machine."""

import logging
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


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
