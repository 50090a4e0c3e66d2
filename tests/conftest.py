"""Settings that hold for the whole suite."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from dcp_plugins.testing.ranks import preload

# Ranks of a test and the workers of pytest-xdist share few cores: more threads in each would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


# The same examples each time: a change is judged by what it changes. HYPOTHESIS_PROFILE=random looks for others.
settings.register_profile("fixed", derandomize=True)
settings.register_profile("random")
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Let ranks fork from a server that has imported, once, the test modules and the frameworks that they are about."""
    if session.config.option.collectonly or not session.items:
        return
    adapters = Path(__file__).parent / "adapters"
    frameworks = {
        item.path.relative_to(adapters).parts[0] for item in session.items if item.path.is_relative_to(adapters)
    }
    modules = {item.module.__name__ for item in session.items if isinstance(item, pytest.Function)}
    trainers = [f"tests.adapters.{name}.trainers" for name in sorted(frameworks)]
    # The first call of torch.compile imports them: half a second for each rank.
    compilers = ["torch._dynamo.backends.debugging", "torch._dynamo.backends.inductor"]
    preload(*trainers, *compilers, *sorted(modules))
    # Without this import, each garbage collection in a test would walk all that was imported for the tests.
    importlib.import_module("dcp_plugins.testing.frozen")


@pytest.fixture(scope="module", autouse=True)
def _frozen_leftovers() -> Iterator[None]:
    """Freeze what a module's tests leave in memory: garbage collections in later tests then do not walk it."""
    yield
    gc.collect()
    gc.freeze()


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
