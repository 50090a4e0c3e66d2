"""What is locked for a device: whole slots, unlocked before it is unmapped, and nothing left behind.

Where there is no device, one takes its place that keeps CUDA's rules and ends the test that breaks them.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import mmap
import os
from collections.abc import Iterator

import pytest
import torch

from dcp_plugins.errors import StagingMemoryError
from dcp_plugins.staging import page_locks
from dcp_plugins.staging.memory import HostMemory
from dcp_plugins.staging.page_locks import PageLocks
from dcp_plugins.staging.stagers import DefaultStager, HandoverStager, StagingOptions

MIB = 1024 * 1024


class Device:
    """Takes locks as CUDA does."""

    def __init__(self) -> None:
        self.locked: dict[int, int] = {}
        self.refuses_after_bytes = 1 << 60
        self.broken_rules: list[str] = []

    def register(self, run: tuple[int, int], device: int) -> None:
        address, nbytes = run
        if address % mmap.PAGESIZE or nbytes % mmap.PAGESIZE:
            self.broken_rules.append(f"{run} is not whole pages")
        if any(address < start + size and start < address + nbytes for start, size in self.locked.items()):
            self.broken_rules.append(f"{run} is locked already")
        if not is_mapped(run):
            self.broken_rules.append(f"{run} is locked, and is not mapped")
        if sum(self.locked.values()) + nbytes > self.refuses_after_bytes:
            raise StagingMemoryError("CUDA's error 2")
        self.locked[address] = nbytes

    def unregister(self, run: tuple[int, int]) -> None:
        if self.locked.pop(run[0], None) != run[1]:
            self.broken_rules.append(f"{run} is not locked")
        if not is_mapped(run):
            self.broken_rules.append(f"{run} was unmapped while it was locked")

    def has_locked(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in one locked run."""
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        return any(first <= start and end <= first + size for first, size in self.locked.items())


def is_mapped(run: tuple[int, int]) -> bool:
    pages = (ctypes.c_ubyte * (run[1] // mmap.PAGESIZE + 1))()
    return ctypes.CDLL(None).mincore(ctypes.c_void_p(run[0]), ctypes.c_size_t(run[1]), pages) == 0


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    found = Device()
    monkeypatch.setattr(page_locks, "_device_in_use", lambda: 0)
    monkeypatch.setattr(page_locks, "_register", found.register)
    monkeypatch.setattr(page_locks, "_unregister", found.unregister)
    yield found
    gc.collect()
    assert found.broken_rules == []
    assert found.locked == {}


def take(memory: HostMemory, sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    memory.begin_round()
    slots = {name: memory.take(name, torch.Size([size]), torch.uint8) for name, size in sizes.items()}
    memory.lock_pages()
    return slots


@pytest.mark.parametrize("shared", [False, True])
def test_every_slot_lies_in_one_locked_run(device: Device, shared: bool) -> None:
    memory = HostMemory(pinned=True, shared=shared)
    sizes = {str(number): 1 + number * 7919 for number in range(400)} | {"large": 9 * MIB + 1, "larger": 40 * MIB}
    slots = take(memory, sizes)
    assert all(map(device.has_locked, slots.values()))
    for number, slot in enumerate(slots.values()):
        slot.fill_(number % 251)
    assert all((slot == number % 251).all() for number, slot in enumerate(slots.values()))
    memory.close()
    assert device.locked == {}
    assert all((slot == number % 251).all() for number, slot in enumerate(slots.values()))


@pytest.mark.parametrize("shared", [False, True])
def test_what_is_no_longer_kept_is_unlocked(device: Device, shared: bool) -> None:
    memory = HostMemory(pinned=True, shared=shared)
    for turn in range(20):
        slots = take(memory, {"stays": 3 * MIB, f"goes {turn}": 2 * MIB, f"small {turn}": 1000})
        assert all(map(device.has_locked, slots.values()))
        assert sum(device.locked.values()) <= (3 + 3 * 2 + 3 * 8) * MIB
    memory.close()


def test_memory_that_nobody_closes_is_unlocked_before_it_is_unmapped(device: Device) -> None:
    memory = HostMemory(pinned=True)
    slots = take(memory, {"a": 2 * MIB, "b": 100})
    assert len(device.locked) == 2
    del memory
    gc.collect()
    assert device.locked == {}
    slots["a"].fill_(1)


def test_what_a_device_refuses_to_lock_is_used_as_it_is_with_one_warning(
    device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    device.refuses_after_bytes = 5 * MIB
    memory = HostMemory(pinned=True)
    with caplog.at_level(logging.WARNING):
        slots = take(memory, {"a": 4 * MIB, "b": 4 * MIB})
        take(memory, {"a": 4 * MIB, "b": 4 * MIB, "c": 4 * MIB})
    assert [device.has_locked(slots[name]) for name in "ab"] == [True, False]
    (record,) = caplog.records
    assert "could not pin 8388608 bytes for staging (CUDA's error 2)" in record.getMessage()
    memory.close()


def test_a_first_snapshot_for_a_process_and_later_ones_are_taken_into_locked_memory(device: Device) -> None:
    stager = HandoverStager()
    stager._memory = HostMemory(pinned=True, shared=True)
    stager._first = HostMemory(pinned=True, times_needed=2)
    state = {"a": torch.ones(MIB), "b": torch.ones(3)}
    first = stager.stage(state)
    assert all(map(device.has_locked, first.values()))
    moved = stager.hand_over(first)
    assert not any(map(device.has_locked, first.values()))
    for staged in (moved, stager.stage(state)):
        assert all(map(device.has_locked, staged.values()))
        assert all(tensor.is_shared() for tensor in staged.values())
    stager.close()


def test_a_fork_leaves_the_locks_to_its_parent(device: Device) -> None:
    stager = DefaultStager(StagingOptions(use_async_staging=False, use_shared_memory=False))
    stager._memory = HostMemory(pinned=True)
    stager.stage({"a": torch.ones(MIB)})
    num_locked = len(device.locked)
    child = os.fork()
    if not child:
        stager.close()
        gc.collect()
        os._exit(0 if len(device.locked) == num_locked > 0 and not device.broken_rules else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    stager.close()


def test_locked_blocks_of_which_little_is_kept_are_left(device: Device) -> None:
    memory = HostMemory(pinned=True)
    for turn in range(20):
        sizes = {f"history {number}": 16 for number in range(turn)}
        take(memory, sizes | {str(number): 800_000 + turn for number in range(12)})
    # Three rounds are kept, of 10 MB.
    assert sum(device.locked.values()) < 60 * MIB
    memory.close()


def test_a_fork_shares_what_is_locked(device: Device) -> None:
    # The pages of private memory would be copied at the fork: all of them, because a device may write to them.
    memory = HostMemory(pinned=True)
    slot = take(memory, {"a": 4 * MIB})["a"].fill_(1)
    child = os.fork()
    if not child:
        slot[0] = 2
        os._exit(0)
    os.waitpid(child, 0)
    assert slot[0] == 2
    memory.close()


def test_without_a_device_in_use_locking_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("another test may have used the device")
    assert not PageLocks.are_of_use()
    with pytest.raises(StagingMemoryError, match="has not used a CUDA device"):
        PageLocks().lock([torch.zeros(4096, dtype=torch.uint8)])


@pytest.mark.gpu
def test_what_cuda_refuses_is_no_later_calls_error() -> None:
    torch.zeros(1, device="cuda")
    memory = HostMemory(pinned=True)
    block = take(memory, {"a": 4 * MIB})["a"]
    with pytest.raises(StagingMemoryError, match="CUDA's error"):
        PageLocks().lock([block])
    assert torch.empty(3 * MIB, pin_memory=True).is_pinned()
    assert torch.ones(3, device="cuda").sum().item() == 3
    torch.cuda.synchronize()
    memory.close()


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [False, True])
def test_memory_locked_again_and_again_leaves_nothing_locked(shared: bool) -> None:
    source = torch.arange(6 * MIB, device="cuda")
    for turn in range(30):
        memory = HostMemory(pinned=True, shared=shared)
        memory.begin_round()
        slot = memory.take("a", source.shape, source.dtype)
        memory.lock_pages()
        assert slot.is_pinned()
        slot.copy_(source + turn, non_blocking=True)
        torch.cuda.synchronize()
        assert torch.equal(slot, (source + turn).cpu())
        if turn % 2:
            memory.close()
        del memory, slot
        gc.collect()


@pytest.mark.gpu
def test_a_copy_from_the_device_arrives_while_forks_live() -> None:
    source = torch.arange(6 * MIB, device="cuda")
    memory = HostMemory(pinned=True)
    memory.begin_round()
    slot = memory.take("a", source.shape, source.dtype)
    memory.lock_pages()
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.read(reader, 1)
        os._exit(0)
    for turn in range(3):
        slot.copy_(source + turn, non_blocking=True)
        torch.cuda.synchronize()
        assert torch.equal(slot, (source + turn).cpu())
        slot.zero_()
    os.write(writer, b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(reader)
    os.close(writer)
    memory.close()
