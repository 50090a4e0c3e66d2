"""Saves in the background of a training on a CUDA device: snapshots, streams, a group without a CPU backend."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import dcp_plugins as dcp
from dcp_plugins.engine import AsyncCheckpointerType, AsyncSaveResponse, await_staging_before_step
from dcp_plugins.engine.process_runner import process_runner
from dcp_plugins.staging import DefaultStager, OverlappedStager, StagingOptions, release_staging_memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint:UserWarning"),
]

SIZE = 4_000_000


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    yield
    process_runner.close()
    release_staging_memory()


def upload_of(begun: Future[Any] | AsyncSaveResponse) -> Future[Any]:
    return begun.upload_completion if isinstance(begun, AsyncSaveResponse) else begun


def loaded(path: Path) -> torch.Tensor:
    target = {"weight": torch.empty(SIZE, device="cuda")}
    dcp.load(target, checkpoint_id=path)
    return target["weight"]


@pytest.mark.parametrize("kind", list(AsyncCheckpointerType))
def test_kernels_queued_before_the_call_are_in_the_snapshot_and_those_after_it_are_not(
    tmp_path: Path, kind: AsyncCheckpointerType
) -> None:
    weight = torch.zeros(SIZE, device="cuda")
    busy = torch.rand(4096, 4096, device="cuda")
    for step in (1, 2, 3):
        for _ in range(20):
            busy = busy @ busy / 4096
        weight += 1
        future = dcp.async_save({"weight": weight}, checkpoint_id=tmp_path / str(step), async_checkpointer_type=kind)
        weight.add_(100).sub_(100)
        upload_of(future).result()
        assert torch.equal(loaded(tmp_path / str(step)), torch.full((SIZE,), float(step), device="cuda"))


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("non_blocking", [True, False])
def test_every_kind_of_staging_gives_the_same_bytes(tmp_path: Path, pinned: bool, non_blocking: bool) -> None:
    stager = DefaultStager(StagingOptions(pinned, False, True, non_blocking))
    weight = torch.rand(SIZE, device="cuda")
    for step in (1, 2):
        weight.mul_(1.5)
        expected = weight.clone()
        begun = dcp.async_save({"weight": weight}, checkpoint_id=tmp_path / str(step), async_stager=stager)
        assert isinstance(begun, AsyncSaveResponse)
        begun.staging_completion.result()
        weight.add_(1)
        begun.upload_completion.result()
        assert torch.equal(loaded(tmp_path / str(step)), expected)
    stager.close()


def test_a_step_waits_for_its_snapshot_and_the_call_does_not(tmp_path: Path) -> None:
    model = torch.nn.Linear(2048, 2048, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    stager = OverlappedStager([optimizer])
    for step in range(3):
        model(torch.rand(64, 2048, device="cuda")).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        expected = {name: value.clone() for name, value in model.state_dict().items()}
        start = time.perf_counter()
        begun = dcp.async_save(model.state_dict(), checkpoint_id=tmp_path / str(step), async_stager=stager)
        returned = time.perf_counter() - start
        assert isinstance(begun, AsyncSaveResponse)
        await_staging_before_step([optimizer], begun.staging_completion)
        model(torch.rand(64, 2048, device="cuda")).square().sum().backward()
        optimizer.step()
        begun.upload_completion.result()
        target = {name: torch.empty_like(value) for name, value in expected.items()}
        dcp.load(target, checkpoint_id=tmp_path / str(step))
        assert all(torch.equal(target[name], expected[name]) for name in expected)
        assert step == 0 or returned < 0.5
    stager.close()


@pytest.mark.parametrize("kind", list(AsyncCheckpointerType))
def test_a_default_group_of_nccl_alone_needs_no_other_group_of_the_users(
    tmp_path: Path, kind: AsyncCheckpointerType
) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda", 0))
    try:
        weight = torch.rand(SIZE, device="cuda")
        expected = weight.clone()
        future = dcp.async_save({"weight": weight}, checkpoint_id=tmp_path / "c", async_checkpointer_type=kind)
        weight.zero_()
        upload_of(future).result()
        assert torch.equal(loaded(tmp_path / "c"), expected)
    finally:
        dist.destroy_process_group()


def test_the_checkpoint_process_takes_no_memory_on_the_device(tmp_path: Path) -> None:
    weight = torch.rand(SIZE, device="cuda")
    torch.cuda.synchronize()
    before, _ = torch.cuda.mem_get_info()
    kind = AsyncCheckpointerType.PROCESS
    upload_of(dcp.async_save({"weight": weight}, checkpoint_id=tmp_path, async_checkpointer_type=kind)).result()
    after, _ = torch.cuda.mem_get_info()
    # A context alone would be hundreds of megabytes.
    assert before - after < 64 * 1024 * 1024
