"""Ranks of these tests fork from a server that has imported Transformers once, if this process starts that server."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing import forkserver

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

# Nothing here asks the hub for anything; what would is to fail at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session", autouse=True)
def ranks_have_transformers() -> None:
    """Import Transformers once, not once per rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.fsdp", "dcp_plugins", "tests.adapters.transformers.trainers"])
    forkserver.ensure_running()
