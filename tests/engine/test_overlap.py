"""Staging during the next forward and backward pass: the step waits, and the snapshot is that of the call."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dcp_plugins as dcp
from dcp_plugins.engine import AsyncSaveResponse, await_staging_before_step
from dcp_plugins.engine.thread_runner import thread_runner
from dcp_plugins.errors import CheckpointException, UnsupportedValueError
from dcp_plugins.staging import OverlappedStager
from dcp_plugins.staging.memory import HostMemory

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@pytest.fixture(autouse=True)
def _nothing_left_in_flight() -> Iterator[None]:
    yield
    thread_runner.finish_previous()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.norm(self.first(x)))
        return out


class Loop:
    """A training loop; its stager's thread can be held, so that what is copied late is copied after all else."""

    def __init__(self, optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = Model()
        self.optimizer = optimizer(self.model.parameters(), **({"lr": 0.1} | options))
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 1)
        self.stager = OverlappedStager([self.optimizer])
        self.batches = 0

    def backward(self) -> torch.Tensor:
        self.batches += 1
        generator = torch.Generator().manual_seed(self.batches)
        loss = self.model(torch.randn(16, 6, generator=generator)).square().mean()
        loss.backward()
        return loss

    def step(self, accumulate: int = 2) -> None:
        for _ in range(accumulate):
            self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "batches": self.batches,
        }

    def begin_save(self, path: Path) -> AsyncSaveResponse:
        response = dcp.async_save(self.state(), checkpoint_id=path, async_stager=self.stager)
        assert isinstance(response, AsyncSaveResponse)
        await_staging_before_step([self.optimizer], response.staging_completion)
        return response

    def hold(self) -> threading.Event:
        let_go = threading.Event()
        self.stager._own_thread().submit(let_go.wait, 20)
        return let_go


def tensors_of(path: Path) -> dict[str, Any]:
    reader = dcp.FileSystemReader(path)
    found: dict[str, Any] = {}

    def visit(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key in value:
                visit(value[key], f"{name}.{key}")
        elif isinstance(value, list):
            for index, item in enumerate(value):
                visit(item, f"{name}.{index}")
        else:
            found[name] = value

    visit(dcp.load_from_keys(storage_reader=reader), "")
    return found


def assert_same(first: Path, second: Path) -> None:
    ours, theirs = tensors_of(first), tensors_of(second)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, theirs[name]), name
        else:
            assert value == theirs[name], name


def test_a_snapshot_taken_during_accumulation_is_bit_for_bit_that_of_a_synchronous_save(tmp_path: Path) -> None:
    loop = Loop()
    for step in range(3):
        loop.step()
        dcp.save(loop.state(), checkpoint_id=tmp_path / f"sync-{step}")
        let_go = loop.hold()
        response = loop.begin_save(tmp_path / f"async-{step}")
        running_mean = loop.model.norm.running_mean.clone()
        for _ in range(2):
            loop.backward()
        assert not torch.equal(loop.model.norm.running_mean, running_mean), "the forward passes have changed buffers"
        assert not response.staging_completion.done()
        threading.Timer(0.05, let_go.set).start()
        loop.step(accumulate=0)
        response.upload_completion.result()
        assert_same(tmp_path / f"async-{step}", tmp_path / f"sync-{step}")


def test_a_step_waits_for_the_snapshot_and_later_steps_do_not(tmp_path: Path) -> None:
    loop = Loop()
    loop.step()
    let_go = loop.hold()
    response = loop.begin_save(tmp_path)
    stepper = threading.Thread(target=loop.step)
    stepper.start()
    stepper.join(0.2)
    assert stepper.is_alive()
    assert loop.batches == 4, "forward and backward have run"
    let_go.set()
    stepper.join(20)
    assert not stepper.is_alive()
    response.upload_completion.result()
    loop.step()
    assert len(loop.optimizer._optimizer_step_pre_hooks) == 1


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.LBFGS])
def test_a_closure_runs_before_the_wait(tmp_path: Path, optimizer: type[torch.optim.Optimizer], by_name: bool) -> None:
    loop = Loop(optimizer)
    loop.optimizer.step(loop.backward)
    dcp.save(loop.state(), checkpoint_id=tmp_path / "sync")
    let_go = loop.hold()
    response = loop.begin_save(tmp_path / "async")
    ran: list[bool] = []

    def closure() -> torch.Tensor:
        loop.optimizer.zero_grad()
        loss = loop.backward()
        ran.append(response.staging_completion.done())
        threading.Timer(0.05, let_go.set).start()
        return loss

    loss = loop.optimizer.step(closure=closure) if by_name else loop.optimizer.step(closure)
    assert loss is not None
    assert ran[0] is False
    response.upload_completion.result()
    assert_same(tmp_path / "async", tmp_path / "sync")


class Perturbing(torch.optim.SGD):
    """Moves the parameters before it asks for the loss, as sharpness-aware minimisation does."""

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(1.0)
        return super().step(closure)


def test_an_optimizer_that_may_change_parameters_before_its_closure_waits_before_both(tmp_path: Path) -> None:
    loop = Loop(Perturbing)
    loop.optimizer.step(loop.backward)
    dcp.save(loop.state(), checkpoint_id=tmp_path / "sync")
    let_go = loop.hold()
    response = loop.begin_save(tmp_path / "async")
    threading.Timer(0.05, let_go.set).start()
    loop.optimizer.step(loop.backward)
    response.upload_completion.result()
    assert_same(tmp_path / "async", tmp_path / "sync")


def test_a_parameter_that_is_changed_too_early_fails_the_save_instead_of_tearing_it(tmp_path: Path) -> None:
    loop = Loop()
    loop.step()
    let_go = loop.hold()
    response = loop.begin_save(tmp_path)
    with torch.no_grad():
        loop.model.first.weight.clamp_(-0.01, 0.01)
    let_go.set()
    with pytest.raises(UnsupportedValueError, match=r"1 tensors of the optimizers .*\(8, 6\)"):
        response.staging_completion.result()
    with pytest.raises(CheckpointException, match="were changed between the save"):
        response.upload_completion.result()
    assert not (tmp_path / ".metadata").exists()
    # The stager now copies this parameter before `stage` returns, and the other parameters later.
    loop.step()
    dcp.save(loop.state(), checkpoint_id=tmp_path / "sync")
    let_go = loop.hold()
    response = loop.begin_save(tmp_path / "async")
    with torch.no_grad():
        loop.model.first.weight.clamp_(-0.01, 0.01)
    let_go.set()
    response.upload_completion.result()
    assert_same(tmp_path / "async", tmp_path / "sync")
    loop.stager.close()


def test_a_stager_that_watches_its_first_save_loses_none(tmp_path: Path) -> None:
    loop = Loop()
    loop.step()
    loop.stager.close()
    loop.stager = OverlappedStager([loop.optimizer], watch_first=True)
    for number in range(2):
        dcp.save(loop.state(), checkpoint_id=tmp_path / f"sync-{number}")
        let_go = loop.hold()
        response = dcp.async_save(loop.state(), checkpoint_id=tmp_path / f"async-{number}", async_stager=loop.stager)
        assert isinstance(response, AsyncSaveResponse)
        await_staging_before_step([loop.optimizer], response.staging_completion, before_step=loop.stager.note_changes)
        with torch.no_grad():
            loop.model.first.weight.clamp_(-0.01, 0.01)
        threading.Timer(0.05, let_go.set).start()
        loop.step()
        response.upload_completion.result()
        assert_same(tmp_path / f"async-{number}", tmp_path / f"sync-{number}")
    loop.stager.close()


def test_parameters_that_the_forward_pass_changes_can_be_staged_at_once(tmp_path: Path) -> None:
    embedding = nn.Embedding(4, 3, max_norm=0.1)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1)
    stager = OverlappedStager([optimizer], changed_by_forward=[embedding.weight])
    before = embedding.weight.detach().clone()
    response = dcp.async_save({"weight": embedding.weight}, checkpoint_id=tmp_path, async_stager=stager)
    assert isinstance(response, AsyncSaveResponse)
    embedding(torch.arange(4))
    assert not torch.equal(embedding.weight, before)
    response.upload_completion.result()
    assert torch.equal(tensors_of(tmp_path)[".weight"], before)
    stager.close()


def test_a_closed_stager_has_no_memory_and_refuses_to_stage(tmp_path: Path) -> None:
    loop = Loop()
    loop.step()
    loop.begin_save(tmp_path).upload_completion.result()
    assert loop.stager.staging_nbytes > 0
    kept = loop.stager.staging_nbytes
    loop.begin_save(tmp_path / "again").upload_completion.result()
    assert loop.stager.staging_nbytes == kept
    loop.stager.close()
    assert loop.stager.staging_nbytes == 0
    with pytest.raises(RuntimeError, match="closed"):
        loop.stager.stage({})


def test_a_failed_staging_does_not_fail_the_step() -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    failed: Future[None] = concurrent.futures.Future()
    failed.set_exception(OSError("no memory"))
    await_staging_before_step([optimizer], failed)
    optimizer.step()
    assert torch.equal(parameter, torch.zeros(2))


@pytest.mark.gpu
def test_what_fits_of_a_state_over_the_budget_is_copied_after_the_kernels_that_compute_it(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.zeros(4, device="cuda"))
    stager = OverlappedStager([torch.optim.SGD([parameter])])
    stager._memory = HostMemory(pinned=True, max_bytes=1_000_000)
    busy, value = torch.zeros(8192, 8192, device="cuda"), torch.zeros(1000, device="cuda")
    for step in range(3):
        for _ in range(40):
            busy = busy @ busy
        value.fill_(step)
        state = {"value": value, "large": torch.zeros(2_000_000, device="cuda") if step else value}
        begun: Any = dcp.async_save(state, checkpoint_id=tmp_path / str(step), async_stager=stager)
        (begun.upload_completion if isinstance(begun, AsyncSaveResponse) else begun).result()
        saved = dcp.load_from_keys("value", checkpoint_id=tmp_path / str(step))["value"]
        assert torch.equal(saved, torch.full((1000,), float(step)))
    stager.close()


@pytest.mark.gpu
def test_on_a_full_device_nothing_is_put_aside(tmp_path: Path) -> None:
    value = torch.ones(8_000_000, device="cuda")
    stager = OverlappedStager([torch.optim.SGD([torch.nn.Parameter(torch.zeros(4, device="cuda"))])])
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved() + 1024 * 1024
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.mem_get_info()[1])
    try:
        begun: Any = dcp.async_save({"value": value}, checkpoint_id=tmp_path, async_stager=stager)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    begun.upload_completion.result()
    assert torch.equal(dcp.load_from_keys("value", checkpoint_id=tmp_path)["value"], torch.ones(8_000_000))
    stager.close()
