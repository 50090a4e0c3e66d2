"""How threads share work: nothing is lost, nobody waits for a thread without a processor, training goes first."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcp_plugins.storage.threads import SharedWork, beside_training, run_all


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


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives each thread a priority of its own")
def test_beside_training_the_helping_threads_yield_and_the_calling_one_does_not() -> None:
    barrier = threading.Barrier(3)

    def niceness(_: int) -> int:
        # All three at the same time, each in a thread of its own.
        barrier.wait(timeout=30)
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert run_all(niceness, range(3)) == [own] * 3
    with beside_training():
        calling, *helping = run_all(niceness, range(3))
    assert calling == own
    assert all(other > own for other in helping)
    assert run_all(niceness, range(3)) == [own] * 3


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives each thread a priority of its own")
def test_beside_a_training_that_is_nicer_still_threads_stay_as_they_are() -> None:
    program = """
        import os
        from dcp_plugins.storage.threads import beside_training, run_all

        os.setpriority(os.PRIO_PROCESS, 0, 19)
        if os.getuid() == 0:
            os.setuid(65534)
        with beside_training():
            print(run_all(lambda _: os.getpriority(os.PRIO_PROCESS, 0), range(2)))
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.stdout == "[19, 19]\n", ended.stderr
