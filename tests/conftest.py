"""Settings that hold for the whole suite."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Ranks of a test and the workers of pytest-xdist share few cores: more threads in each would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """Give every test the same random numbers, whichever worker runs it and in whatever order."""
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def _no_process_group_left_behind() -> Iterator[None]:
    """Fail the test that leaves a process group in the pytest process instead of the tests after it."""
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        pytest.fail("the test left torch.distributed initialised in the pytest process")
