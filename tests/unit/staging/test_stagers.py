"""The stagers have torch's calls, keep their memory, and give a machine without an accelerator what it can have."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import gc
import inspect
import logging
import os
import signal
import threading
import warnings
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint.staging as torch_staging

from dcp_plugins import staging
from dcp_plugins.errors import UnsupportedValueError
from dcp_plugins.staging import (
    AsyncStager,
    BlockingAsyncStager,
    DefaultStager,
    HandoverStager,
    StagingOptions,
    kept_memory,
    memory,
    placement,
    stagers,
)
from tests.unit.staging.resident import resident_bytes


def plain() -> StagingOptions:
    return StagingOptions(False, False, False, False)


def state(value: float = 1.0) -> dict[str, Any]:
    return {"model": {"weight": torch.full((300, 300), value), "bias": torch.full((3,), value)}, "step": int(value)}


def assert_state(staged: dict[str, Any], value: float) -> None:
    assert torch.equal(staged["model"]["weight"], torch.full((300, 300), value))
    assert torch.equal(staged["model"]["bias"], torch.full((3,), value))
    assert staged["step"] == int(value)


def change(state_dict: dict[str, Any]) -> None:
    state_dict["model"]["weight"].fill_(-1)
    state_dict["model"]["bias"].fill_(-1)


@pytest.mark.parametrize("name", ["DefaultStager", "BlockingAsyncStager", "StagingOptions"])
def test_constructors_and_methods_take_what_torchs_take(name: str) -> None:
    theirs, ours = getattr(torch_staging, name), getattr(staging, name)
    expected = [(p.name, p.kind) for p in inspect.signature(theirs).parameters.values()]
    found = list(inspect.signature(ours).parameters.values())
    assert [(p.name, p.kind) for p in found[: len(expected)]] == expected
    # What torch's does not have can be left out, and does not come by position.
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in found[len(expected) :])
    if name != "StagingOptions":
        for method in ("stage", "synchronize_staging", "close"):
            assert list(inspect.signature(getattr(ours, method)).parameters) == list(
                inspect.signature(getattr(theirs, method)).parameters
            )


def test_the_options_have_torchs_defaults() -> None:
    assert dataclasses.asdict(StagingOptions()) == dataclasses.asdict(torch_staging.StagingOptions())


def test_the_protocol_is_torchs_own() -> None:
    assert AsyncStager is torch_staging.AsyncStager
    stager = DefaultStager(plain())
    assert isinstance(stager, AsyncStager)
    assert stager.should_synchronize_after_execute
    assert not BlockingAsyncStager().should_synchronize_after_execute
    stager.close()


def test_staging_blocks_and_keeps_its_memory() -> None:
    stager = DefaultStager(plain())
    places = set()
    for value in (1.0, 2.0, 3.0):
        original = state(value)
        staged = stager.stage(original)
        assert isinstance(staged, dict)
        change(original)
        assert_state(staged, value)
        places.add(staged["model"]["weight"].data_ptr())
    assert len(places) == 1
    assert stager.staging_nbytes == 300 * 300 * 4 + 12
    stager.close()
    assert stager.staging_nbytes == 0


def test_a_closed_stager_says_so_and_may_be_closed_twice() -> None:
    stager = DefaultStager(plain())
    stager.close()
    stager.close()
    with pytest.raises(RuntimeError, match="closed"):
        stager.stage(state())


def test_asynchronous_staging_works_without_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    stager = DefaultStager(StagingOptions(False, False, True, False))
    held = threading.Event()
    real = kept_memory.take_snapshot

    def slow(*args: Any, **kwargs: Any) -> Any:
        assert held.wait(10)
        assert threading.current_thread() is not threading.main_thread()
        return real(*args, **kwargs)

    monkeypatch.setattr(kept_memory, "take_snapshot", slow)
    original = state()
    future = stager.stage(original)
    assert isinstance(future, concurrent.futures.Future)
    assert not future.done()
    held.set()
    stager.synchronize_staging()
    change(original)
    assert_state(future.result(), 1.0)
    stager.close()


def test_a_failure_of_asynchronous_staging_is_raised_where_it_is_awaited() -> None:
    stager = DefaultStager(StagingOptions(False, False, True, False))
    future = stager.stage({"lock": threading.Lock()})
    assert isinstance(future, concurrent.futures.Future)
    with pytest.raises(UnsupportedValueError, match="lock"):
        stager.synchronize_staging()
    with pytest.raises(UnsupportedValueError):
        future.result()
    stager.close()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a machine without an accelerator")
def test_a_build_of_torch_for_cuda_stages_where_there_is_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    # What such a build answers: it names the device it was built for, and raises when it is asked for a stream of it.
    monkeypatch.setattr(torch._C, "_accelerator_getAccelerator", lambda: torch.device("cuda"))
    assert torch.accelerator.current_accelerator() == torch.device("cuda")
    for asynchronous in (False, True):
        stager = DefaultStager(StagingOptions(use_async_staging=asynchronous))
        staged = stager.stage({"t": torch.arange(5.0)})
        result = staged.result() if isinstance(staged, concurrent.futures.Future) else staged
        assert torch.equal(result["t"], torch.arange(5.0))
        stager.close()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a machine without an accelerator")
def test_without_an_accelerator_the_options_degrade_with_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stagers, "_missing_said", False)
    with warnings.catch_warnings(), caplog.at_level(logging.INFO):
        warnings.simplefilter("error")
        for _ in range(3):
            stager = DefaultStager(StagingOptions())
            staged = stager.stage(state())
            assert isinstance(staged, concurrent.futures.Future)
            assert_state(staged.result(), 1.0)
            assert staged.result()["model"]["weight"].is_shared()
            stager.close()
    assert len(caplog.records) == 1
    assert "use_pinned_memory" in caplog.text
    assert "use_non_blocking_copy" in caplog.text


@pytest.mark.parametrize("cached", [False, True])
def test_the_blocking_stager_stages(cached: bool) -> None:
    stager = BlockingAsyncStager(cache_staged_state_dict=cached)
    first, second = state(1.0), state(2.0)
    staged_first = stager.stage(first)
    place = staged_first["model"]["weight"].data_ptr()
    change(first)
    assert_state(staged_first, 1.0)
    staged_second = stager.stage(second)
    assert_state(staged_second, 2.0)
    assert (staged_second["model"]["weight"].data_ptr() == place) is cached
    assert (stager.staging_nbytes > 0) is cached
    assert (stager.state_dict_cache is not None) is cached
    if not cached:
        assert_state(staged_first, 1.0)
    stager.close()
    assert stager.staging_nbytes == 0
    assert_state(stager.stage(state(4.0)), 4.0)
    stager.close()


def test_the_type_check_names_what_it_refuses() -> None:
    stager = BlockingAsyncStager(type_check=True)
    stager.stage({"a": [1, "x", None, b"", torch.ones(1)], "b": OrderedDict(c=1.0)})
    with pytest.raises(UnsupportedValueError, match=r"'a\.0' \(object\)"):
        stager.stage({"a": [object()]})


def test_the_stager_of_the_process_keeps_its_memory_until_it_is_released() -> None:
    stager = staging.shared_stager()
    stager.stage(state())
    assert staging.shared_stager() is stager
    assert stager.staging_nbytes > 0
    staging.release_staging_memory()
    assert stager.staging_nbytes == 0
    assert staging.shared_stager() is not stager
    staging.release_staging_memory()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_forked_child_that_stages_leaves_its_parents_snapshot_alone(asynchronous: bool) -> None:
    options = dataclasses.replace(plain(), use_shared_memory=True, use_async_staging=asynchronous)
    stager = DefaultStager(options)
    blocking = BlockingAsyncStager(cache_staged_state_dict=True)
    shared = staging.shared_stager(for_process=True)

    def stage_all(values: dict[str, Any]) -> list[dict[str, Any]]:
        first = stager.stage(values)
        return [
            first.result(timeout=20) if isinstance(first, concurrent.futures.Future) else first,
            blocking.stage(values),
            shared.hand_over(shared.stage(values)),
        ]

    stage_all(state(1.0))
    snapshots = stage_all(state(1.0))
    child = os.fork()
    if not child:
        signal.alarm(60)
        with contextlib.suppress(BaseException):
            for staged in stage_all(state(9.0)):
                assert_state(staged, 9.0)
            os._exit(0)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    for staged in snapshots:
        assert_state(staged, 1.0)
    staging.release_staging_memory()


@pytest.mark.parametrize("shared", [False, True])
def test_memory_of_tensors_that_are_gone_is_given_back_though_small_ones_beside_them_stay(shared: bool) -> None:
    flat = torch.ones(100 * 250_100)
    full = {}
    for number, part in enumerate(flat.split(250_100)):
        full[f"{number}.moment"], full[f"{number}.step"] = part[:250_000], part[250_000:]
    small = {name: tensor for name, tensor in full.items() if name.endswith("step")}
    stager = DefaultStager(dataclasses.replace(plain(), use_shared_memory=shared), max_staging_bytes=110_000_000)
    other = {f"{number}.other": torch.ones(250_000) for number in range(100)}
    before = resident_bytes()
    stager.stage(full)
    for _ in range(10):
        staged = stager.stage(small)
    assert resident_bytes() - before < 20_000_000
    stager.stage(other | small)
    assert resident_bytes() - before < 130_000_000
    assert all(torch.equal(staged[name], tensor) for name, tensor in small.items())
    stager.close()


def test_a_fork_during_a_snapshot_collects_garbage() -> None:
    class Forks:
        child = -1

        def __deepcopy__(self, memo: dict[int, Any]) -> Forks:
            self.child = os.fork()
            if not self.child:
                os._exit(0 if gc.isenabled() else 1)
            return self

    forks = Forks()
    BlockingAsyncStager().stage({"forks": forks})
    _, status = os.waitpid(forks.child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_staging_again_and_again_grows_nothing() -> None:
    stager = DefaultStager(plain())
    original = state()
    stager.stage(original)
    kept = stager.staging_nbytes
    threads = threading.active_count()
    for _ in range(50):
        stager.stage(original)
    assert stager.staging_nbytes == kept
    assert threading.active_count() == threads
    stager.close()


@pytest.mark.gpu
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_device_is_staged_through_pinned_memory(asynchronous: bool) -> None:
    stager = DefaultStager(StagingOptions(True, False, asynchronous, True))
    original = torch.arange(10_000_000.0, device="cuda")
    expected = original.cpu() * 2
    original.mul_(2)  # still under way when staging begins
    staged = stager.stage({"t": original})
    result = staged.result() if isinstance(staged, concurrent.futures.Future) else staged
    original.zero_()
    assert result["t"].is_pinned()
    assert torch.equal(result["t"], expected)
    stager.close()


def test_a_first_snapshot_for_a_process_is_private_and_moved_into_shared_memory_when_handed_over() -> None:
    stager = HandoverStager()
    source = torch.arange(3_000_000.0)
    tied = source[1_000_000:]
    first = stager.stage({"a": source, "b": {"tied": tied, "step": 3}})
    assert not first["a"].is_shared()
    source.zero_()
    moved = stager.hand_over(first)
    assert moved["a"].is_shared()
    assert torch.equal(moved["a"], torch.arange(3_000_000.0))
    assert torch.equal(moved["b"]["tied"], torch.arange(1_000_000.0, 3_000_000.0))
    assert moved["b"]["tied"].untyped_storage().data_ptr() == moved["a"].untyped_storage().data_ptr()
    assert moved["b"]["step"] == 3
    # Of the two copies one is kept.
    assert stager.staging_nbytes == source.nbytes
    stager.close()


def test_later_snapshots_for_a_process_are_taken_where_the_first_was_moved_to() -> None:
    stager = HandoverStager()
    source = torch.zeros(3_000_000)
    moved = stager.hand_over(stager.stage({"a": source}))
    address = moved["a"].data_ptr()
    source += 1
    second = stager.stage({"a": source})
    assert second["a"].data_ptr() == address
    assert stager.hand_over(second) is second
    assert torch.equal(second["a"], source)
    stager.close()


def test_the_second_snapshot_for_a_process_needs_no_look_at_what_lies_in_what(monkeypatch: pytest.MonkeyPatch) -> None:
    stager = HandoverStager()
    whole = torch.arange(1_000_000.0)
    state = {"whole": whole, "part": whole[10:20], "strided": torch.ones(40, 50).t(), "n": torch.tensor(3)}
    stager.hand_over(stager.stage(state))
    monkeypatch.setattr(placement, "_nesting", None)
    whole += 1
    second = stager.stage(state)
    assert all(torch.equal(second[name], state[name]) for name in state)
    assert second["part"].data_ptr() == second["whole"].data_ptr() + 40
    stager.close()


def test_a_snapshot_for_a_process_is_taken_once_where_there_is_no_memory_for_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nbytes = 100 * 1024 * 1024
    monkeypatch.setattr(memory, "available_bytes", lambda: nbytes * 3 // 2)
    stager = HandoverStager()
    staged = stager.stage({"a": torch.ones(nbytes, dtype=torch.uint8)})
    assert staged["a"].is_shared()
    assert stager.hand_over(staged) is staged
    stager.close()


@pytest.mark.gpu
def test_a_fork_after_a_stage_from_a_device_leaves_the_device_alone(capfd: pytest.CaptureFixture[str]) -> None:
    stager = DefaultStager(StagingOptions(use_async_staging=False))
    stager.stage({"a": torch.ones(3, device="cuda")})
    child = os.fork()
    if not child:
        signal.alarm(60)
        gc.collect()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert capfd.readouterr().err == ""
    stager.close()
