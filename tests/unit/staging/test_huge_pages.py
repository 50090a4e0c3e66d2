"""New memory is made of huge pages while they come fast, and nothing but what is to be overwritten is touched."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dcp_plugins.staging import host_copy
from dcp_plugins.staging.host_copy import copy_on_host
from dcp_plugins.staging.huge_pages import HugePages
from dcp_plugins.staging.memory import HostMemory

MIB = 1024 * 1024
PAGE = 2 * MIB
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def memory_of_whole_pages(count: int) -> torch.Tensor:
    block = torch.frombuffer(mmap.mmap(-1, (count + 1) * PAGE), dtype=torch.uint8)
    skipped = -block.data_ptr() % PAGE
    return block[skipped : skipped + count * PAGE]


class Timed(HugePages):
    """Notes which pages are made, and finds them as slow as it is told."""

    def __init__(self, is_slow: Callable[[int], bool]) -> None:
        super().__init__()
        self.made: list[int] = []
        self._is_slow = is_slow

    def _seconds_to_make(self, page: int, byte: int) -> float:  # type: ignore[override]
        assert page <= byte < page + PAGE
        self.made.append(page)
        return 0.005 if self._is_slow(len(self.made)) else 0.0002


def made_of(pages: Timed, memory: torch.Tensor) -> list[int]:
    """Write to memory in pieces, and return the numbers of the pages that were made huge."""
    pages.expect(memory)
    for start in range(0, memory.nbytes, 3 * MIB):
        piece = memory[start : start + 3 * MIB]
        pages.make(piece.data_ptr(), piece.nbytes)
    return [(page - memory.data_ptr()) // PAGE for page in pages.made]


def test_fast_pages_are_all_made_once() -> None:
    pages = Timed(lambda _: False)
    memory = memory_of_whole_pages(40)
    assert made_of(pages, memory) == list(range(40))
    pages.make(memory.data_ptr(), memory.nbytes)
    assert len(pages.made) == 40


def test_where_pages_are_slow_few_are_tried() -> None:
    pages = Timed(lambda _: True)
    assert made_of(pages, memory_of_whole_pages(1000)) == [0, 1, 2, 3, 4]


def test_where_few_pages_are_slow_all_are_made() -> None:
    pages = Timed(lambda number: number in (3, 4) or number % 10 == 0)
    assert made_of(pages, memory_of_whole_pages(200)) == list(range(200))


def test_where_pages_become_slow_no_more_is_lost_than_they_have_saved() -> None:
    pages = Timed(lambda number: number > 100)
    made = made_of(pages, memory_of_whole_pages(1000))
    assert 100 < len(made) < 125


def test_another_snapshot_is_tried_anew() -> None:
    pages = Timed(lambda number: number <= 5)
    assert len(made_of(pages, memory_of_whole_pages(100))) == 5
    pages.made.clear()
    memory = memory_of_whole_pages(100)
    pages._is_slow = lambda _: False
    assert made_of(pages, memory) == list(range(100))


def test_pages_that_are_not_whole_are_left_alone() -> None:
    pages = Timed(lambda _: False)
    memory = memory_of_whole_pages(3)[1 : 3 * PAGE - 1]
    pages.expect(memory)
    pages.make(memory.data_ptr(), memory.nbytes)
    assert pages.made == [memory.data_ptr() - 1 + PAGE]


def test_nothing_outside_of_the_run_is_touched() -> None:
    pages = HugePages()
    memory = memory_of_whole_pages(2)
    pages.expect(memory)
    memory.fill_(7)
    pages.make(memory.data_ptr() + 100, PAGE)
    assert (memory[:100] == 7).all()
    assert (memory[PAGE + 100 :] == 7).all()


def test_what_is_let_go_of_is_not_made() -> None:
    pages = Timed(lambda _: False)
    memory = memory_of_whole_pages(3)
    pages.expect(memory)
    pages.forget(memory)
    pages.make(memory.data_ptr(), memory.nbytes)
    assert pages.made == []


def mappings_in(memory: torch.Tensor) -> list[int]:
    """Return how many bytes of each mapping that a tensor lies in may be huge pages, as far as there are free ones."""
    first, last = memory.data_ptr(), memory.data_ptr() + memory.nbytes
    found = []
    start = end = 0
    is_here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if "-" in name:
            start, end = (int(part, 16) for part in name.split("-"))
            is_here = start < last and first < end
        elif is_here and name == "VmFlags:":
            found.append(end - start if "hg" in values else 0)
    return found


@pytest.mark.skipif(not SETTING.exists() or "[never]" in SETTING.read_text(), reason="this system makes no huge pages")
@pytest.mark.parametrize("is_strided", [False, True])
def test_a_large_slot_is_copied_into_huge_pages_of_few_mappings(
    monkeypatch: pytest.MonkeyPatch, is_strided: bool
) -> None:
    pages = HugePages()
    # However slow they are here.
    monkeypatch.setattr("dcp_plugins.staging.huge_pages._CREDIT_SECONDS", 60.0)
    monkeypatch.setattr("dcp_plugins.staging.memory.huge_pages", pages)
    monkeypatch.setattr(host_copy, "huge_pages", pages)
    source = torch.arange(32 * MIB, dtype=torch.int32)
    if is_strided:
        source = source.view(1024, -1).t()
    memory = HostMemory()
    memory.begin_round()
    target = memory.take("a", source.shape, source.dtype)
    copy_on_host([target], [source])
    assert torch.equal(target, source)
    huge_bytes = mappings_in(target)
    assert sum(huge_bytes) >= 62 * PAGE
    assert len(huge_bytes) <= 4
    memory.close()
