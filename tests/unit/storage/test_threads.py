"""How threads share work: nothing is lost, nobody waits for a thread without a processor, training goes first."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcp_plugins.storage.threads import SharedWork
from tests.programs import run_program


@given(st.lists(st.lists(st.integers(), max_size=5), min_size=1, max_size=4), st.data())
def test_every_piece_is_taken_once_in_whatever_order_the_threads_run(
    shares: list[list[int]], data: st.DataObject
) -> None:
    work = SharedWork(shares)
    lanes = {number: work.take(number) for number in range(len(shares))}
    taken = []
    while lanes:
        number = data.draw(st.sampled_from(sorted(lanes)))
        piece = next(lanes[number], None)
        if piece is None:
            del lanes[number]
        else:
            taken.append(piece)
    assert sorted(taken) == sorted(piece for share in shares for piece in share)


def test_a_thread_takes_its_own_share_in_order_before_the_others_from_their_ends() -> None:
    work = SharedWork([["a", "b"], ["c", "d", "e"]])
    assert list(work.take(0)) == ["a", "b", "e", "d", "c"]


def test_what_is_dropped_is_taken_by_nobody() -> None:
    work = SharedWork([[1, 2, 3], [4]])
    lane = work.take(0)
    assert next(lane) == 1
    work.drop()
    assert list(lane) == []
    assert list(work.take(1)) == []


SHARES_A_PROCESSOR = """
import hashlib, os, sys, threading
from contextlib import nullcontext
from dcp_plugins.storage.threads import SharedWork, beside_training, run_all

# The only processor that the threads have; hashing releases the interpreter lock.
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
piece = bytes(2_000_000)
counts = [0, 0]

def work_off(share):
    for _ in work.take(share):
        hashlib.sha256(piece).digest()
        counts[share] += 1

how = sys.argv[1]
with nullcontext() if how == "alone" else beside_training(lambda: how == "awaited"):
    work = SharedWork([range(40), range(40)])
    run_all(work_off, range(2))
assert sum(counts) == 80, counts
print(counts[1])
"""


def helped(how: str, folder: Path) -> int:
    program = folder / "program.py"
    program.write_text(SHARES_A_PROCESSOR)
    done = run_program(program, how, folder=folder)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="nothing is tested where nobody says how long a thread has waited")
def test_a_helping_thread_shares_a_processor_where_somebody_waits_for_its_work(tmp_path: Path) -> None:
    assert helped("awaited", tmp_path) >= 20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how long a thread has waited for a processor")
def test_beside_training_a_helping_thread_that_shares_a_processor_leaves_its_work_to_the_first(tmp_path: Path) -> None:
    # It notices after a turn on the processor, whose length the system chooses: nine pieces of its 40 is usual.
    assert helped("beside", tmp_path) <= 12
    assert helped("alone", tmp_path) >= 20
