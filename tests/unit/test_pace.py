"""Turns of a background: it sleeps many times as long as it ran, and only its own running counts."""

from __future__ import annotations

import threading
import time

import pytest

from dcp_plugins.pace import _SLEEP_PER_TURN, Awaited, elsewhere, give_way, giving_way, hurry, paced
from dcp_plugins.storage.threads import run_all


class Sleeps(Awaited):
    """Notes how long somebody wants to sleep, instead of sleeping."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        if not self.is_set():
            assert timeout is not None
            self.seconds.append(timeout)
        return self.is_set()


def run_for(seconds: float) -> None:
    """Keep a processor busy."""
    start = time.thread_time()
    while time.thread_time() - start < seconds:
        pass


def test_a_thread_that_had_its_turn_sleeps_many_times_as_long() -> None:
    sleeps = Sleeps()
    with paced(sleeps):
        run_for(0.004)
        give_way()
        give_way()
    assert len(sleeps.seconds) == 1, "the second time it had not run"
    assert sleeps.seconds[0] >= _SLEEP_PER_TURN * 0.004


def test_short_stretches_add_up() -> None:
    sleeps = Sleeps()
    with paced(sleeps):
        for _ in range(8):
            run_for(0.0003)
            give_way()
    assert 1 <= len(sleeps.seconds) <= 4
    assert sum(sleeps.seconds) >= _SLEEP_PER_TURN * 0.0015


def test_no_sleep_is_longer_than_a_second() -> None:
    sleeps = Sleeps()
    with paced(sleeps):
        run_for(0.08)
        give_way()
    assert sleeps.seconds == [1.0]


def test_what_is_computed_elsewhere_and_waiting_do_not_count() -> None:
    sleeps = Sleeps()
    with paced(sleeps):
        with elsewhere():
            run_for(0.01)
            with elsewhere():
                run_for(0.01)
        time.sleep(0.01)
        give_way()
    assert sleeps.seconds == []


def test_running_before_and_after_what_is_computed_elsewhere_counts() -> None:
    sleeps = Sleeps()
    with paced(sleeps):
        run_for(0.002)
        with elsewhere():
            run_for(0.05)
        run_for(0.002)
        give_way()
    (slept,) = sleeps.seconds
    assert _SLEEP_PER_TURN * 0.004 <= slept < _SLEEP_PER_TURN * 0.05


def test_a_thread_in_a_hurry_does_not_sleep() -> None:
    sleeps = Sleeps()
    with paced(sleeps):
        hurry()
        run_for(0.004)
        give_way()
    assert sleeps.is_set()
    assert sleeps.seconds == []


def test_a_sleeping_thread_wakes_up_when_somebody_waits() -> None:
    awaited = Awaited()
    asleep = threading.Event()
    took: list[float] = []

    def background() -> None:
        with paced(awaited):
            run_for(0.08)
            asleep.set()
            start = time.monotonic()
            give_way()
            took.append(time.monotonic() - start)

    thread = threading.Thread(target=background)
    thread.start()
    assert asleep.wait(20)
    awaited.set()
    thread.join(20)
    assert took[0] < 0.9, "it would have slept for a second"


def test_a_flag_shows_for_as_long_as_it_is_asked_to_whether_somebody_waits() -> None:
    awaited, flag = Awaited(), bytearray(b"\1")
    with awaited.shown_in(flag):
        assert flag == b"\0"
        awaited.set()
        assert flag == b"\1"
    later, flag = Awaited(), bytearray(1)
    with later.shown_in(flag):
        pass
    later.set()
    assert flag == b"\0"


def test_a_flag_shows_from_the_start_that_somebody_waits_already() -> None:
    awaited, flag = Awaited(), bytearray(1)
    awaited.set()
    with awaited.shown_in(flag):
        assert flag == b"\1"


def test_threads_that_work_for_a_background_keep_its_pace_together() -> None:
    sleeps = Sleeps()
    together = threading.Barrier(3)

    def work(_: int) -> None:
        together.wait(20)
        run_for(0.004)
        give_way()
        together.wait(20)

    with paced(sleeps):
        run_all(work, range(3))
    assert len(sleeps.seconds) == 3
    assert min(sleeps.seconds) >= 3 * _SLEEP_PER_TURN * 0.004, "each sleeps while the others have their turns"
    run_all(work, range(3))
    assert len(sleeps.seconds) == 3, "outside there is no pace"


def test_what_helpers_and_the_thread_itself_did_together_is_not_counted_again() -> None:
    sleeps = Sleeps()

    def work(_: int) -> None:
        with elsewhere():
            run_for(0.02)

    with paced(sleeps):
        run_all(work, range(2))
        give_way()
    assert sleeps.seconds == []


def test_a_thread_whose_helpers_have_ended_sleeps_for_itself_alone() -> None:
    sleeps = Sleeps()
    ended = threading.Event()

    def work(number: int) -> None:
        if number:
            ended.set()
            return
        assert ended.wait(20)
        time.sleep(0.1)
        run_for(0.004)
        give_way()

    with paced(sleeps):
        run_all(work, range(2))
    (slept,) = sleeps.seconds
    assert _SLEEP_PER_TURN * 0.004 <= slept < 2 * _SLEEP_PER_TURN * 0.004


@pytest.mark.parametrize("is_paced", [False, True])
def test_a_loop_that_gives_way_sees_every_item_in_order(is_paced: bool) -> None:
    sleeps = Sleeps()
    items = range(1000)
    with paced(sleeps if is_paced else None):
        seen = []
        for item in giving_way(items):
            run_for(0.00001)
            seen.append(item)
    assert seen == list(items)
    assert bool(sleeps.seconds) == is_paced
