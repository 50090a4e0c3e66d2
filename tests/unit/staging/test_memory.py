"""Staging memory is given out again, is bounded, and is gone after close."""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
import weakref

import pytest
import torch
import torch.multiprocessing

from dcp_plugins.staging import memory as memory_module
from dcp_plugins.staging.memory import HostMemory
from tests.unit.staging.resident import resident_bytes

MIB = 1024 * 1024


def take(memory: HostMemory, sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    memory.begin_round()
    return {name: memory.take(name, torch.Size([size]), torch.uint8) for name, size in sizes.items()}


def test_the_next_round_is_given_the_same_memory() -> None:
    memory = HostMemory()
    sizes = {"small": 100, "empty": 0, "large": 3 * MIB}
    first = take(memory, sizes)
    again = take(memory, sizes)
    assert all(first[name] is again[name] for name in sizes)
    assert memory.nbytes == sum(sizes.values())


def test_slots_do_not_overlap_and_are_aligned() -> None:
    memory = HostMemory()
    slots = take(memory, {str(number): number * 37 for number in range(200)})
    for number, slot in enumerate(slots.values()):
        slot.fill_(number)
        assert not slot.numel() or slot.data_ptr() % 64 == 0
    assert all((slot == number).all() for number, slot in enumerate(slots.values()))


@pytest.mark.parametrize("shared", [False, True])
def test_large_slots_can_be_used_to_the_last_byte(shared: bool) -> None:
    slot = take(HostMemory(shared=shared), {"large": 5 * MIB + 123})["large"]
    slot.fill_(7)
    assert slot.numel() == 5 * MIB + 123
    assert (slot == 7).all()


def test_two_states_in_turn_keep_their_memory_and_what_is_gone_is_freed() -> None:
    memory = HostMemory()
    first = take(memory, {"a": 2 * MIB})["a"].data_ptr()
    take(memory, {"b": 2 * MIB})
    assert take(memory, {"a": 2 * MIB})["a"].data_ptr() == first
    for _ in range(3):
        take(memory, {"c": 1})
    assert memory.nbytes == 1


@pytest.mark.parametrize("shared", [False, True])
def test_blocks_of_which_little_is_kept_are_left(shared: bool) -> None:
    memory = HostMemory(shared=shared)
    before = resident_bytes()
    for turn in range(20):
        take(memory, {f"history {number}": 16 for number in range(turn)})
        for number in range(12):
            memory.take(number, torch.Size([800_000 + turn]), torch.uint8).fill_(1)
    # Three rounds are kept, of 10 MB.
    assert resident_bytes() - before < 60 * MIB
    memory.close()


def test_small_slots_that_stay_keep_their_memory_though_others_change() -> None:
    memory = HostMemory()
    sizes = {str(number): 100_000 for number in range(60)} | {str(-number): 4 for number in range(1, 2000)}
    addresses = {name: slot.data_ptr() for name, slot in take(memory, sizes).items()}
    for turn in range(5):
        slots = take(memory, sizes | {"changes": 200_000 + turn})
        assert {name: slots[name].data_ptr() for name in sizes} == addresses


def test_another_shape_or_dtype_is_another_slot() -> None:
    memory = HostMemory()
    memory.begin_round()
    floats = memory.take("t", torch.Size([4]), torch.float32)
    memory.begin_round()
    longs = memory.take("t", torch.Size([4]), torch.int64)
    assert floats.data_ptr() != longs.data_ptr()


@pytest.mark.parametrize("shared", [False, True])
def test_close_gives_the_memory_back_to_the_system(shared: bool) -> None:
    memory = HostMemory(shared=shared)
    before = resident_bytes()
    for slot in take(memory, {str(number): 8 * MIB for number in range(8)}).values():
        slot.fill_(1)
    del slot
    assert resident_bytes() - before > 50 * MIB
    memory.close()
    gc.collect()
    assert resident_bytes() - before < 20 * MIB
    assert memory.nbytes == 0


def test_what_was_given_out_survives_close() -> None:
    memory = HostMemory()
    slot = take(memory, {"large": 4 * MIB})["large"]
    slot.fill_(3)
    memory.close()
    del memory
    gc.collect()
    assert (slot == 3).all()


def test_shared_memory_is_shared_and_needs_few_descriptors() -> None:
    memory = HostMemory(shared=True)
    before = len(os.listdir("/proc/self/fd"))
    slots = take(memory, {str(number): 4096 for number in range(5000)})
    assert all(slot.is_shared() for slot in slots.values())
    assert len(os.listdir("/proc/self/fd")) - before <= 5
    memory.close()
    slots.clear()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_another_process_sees_shared_memory_without_a_copy() -> None:
    memory = HostMemory(shared=True)
    slot = take(memory, {"a": 4096})["a"].zero_()
    process = torch.multiprocessing.get_context("forkserver").Process(target=fill, args=(slot,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert (slot == 9).all()


def fill(tensor: torch.Tensor) -> None:
    tensor.fill_(9)


def test_without_shared_memory_staging_goes_on_in_private_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(nbytes: int) -> torch.Tensor:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(memory_module, "map_shared", full)
    memory = HostMemory(shared=True)
    with caplog.at_level(logging.WARNING):
        slots = take(memory, {"a": 2 * MIB, "b": 2 * MIB})
    assert not slots["a"].is_shared()
    assert len(caplog.records) == 1
    assert "shared memory" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine that cannot pin")
def test_where_no_device_is_used_nothing_is_pinned_and_nothing_said(caplog: pytest.LogCaptureFixture) -> None:
    memory = HostMemory(pinned=True)
    with caplog.at_level(logging.WARNING):
        slots = take(memory, {"a": 2 * MIB, "b": 2 * MIB})
        memory.lock_pages()
    slots["a"].fill_(1)
    assert not slots["a"].is_pinned()
    assert caplog.records == []


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [False, True])
def test_pinned_memory_is_pinned(shared: bool) -> None:
    torch.zeros(1, device="cuda")
    memory = HostMemory(pinned=True, shared=shared)
    slots = take(memory, {"small": 10, "large": 2 * MIB})
    memory.lock_pages()
    assert slots["small"].is_pinned()
    assert slots["large"].is_pinned()
    assert slots["large"].is_shared() is shared
    memory.close()
    assert not slots["large"].is_pinned()


def test_memory_is_freed_with_its_owner() -> None:
    memory = HostMemory()
    slot = weakref.ref(take(memory, {"a": 2 * MIB})["a"])
    del memory
    gc.collect()
    assert slot() is None


def test_its_size_can_be_asked_for_while_another_thread_takes_more() -> None:
    memory = HostMemory()
    memory.begin_round()
    ended = threading.Event()

    def take_many() -> None:
        for number in range(10_000):
            memory.take(number, torch.Size([1]), torch.uint8)
        ended.set()

    thread = threading.Thread(target=take_many)
    interval = sys.getswitchinterval()
    # Threads meet in more places, and the one that takes does not wait out the interval after each call of torch.
    sys.setswitchinterval(1e-5)
    try:
        thread.start()
        while not ended.is_set():
            assert memory.nbytes <= 10_000
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert memory.nbytes == 10_000
