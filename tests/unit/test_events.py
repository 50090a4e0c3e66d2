from __future__ import annotations

import logging
import timeit

import pytest

from dcp_plugins import events, logger, logging_handlers


def test_a_span_gives_a_start_and_an_end_with_its_duration_and_late_facts() -> None:
    seen: list[events.Event] = []
    unsubscribe = events.subscribe(seen.append)
    try:
        with events.record("write", checkpoint_id="a") as span:
            span.add(num_bytes=3)
    finally:
        unsubscribe()
    start, end = seen
    assert (start.name, start.kind, start.duration_ns, dict(start.fields)) == (
        "write",
        "start",
        None,
        {"checkpoint_id": "a"},
    )
    assert (end.kind, dict(end.fields)) == ("end", {"checkpoint_id": "a", "num_bytes": 3})
    assert end.span_id == start.span_id
    assert end.duration_ns is not None
    assert end.duration_ns >= 0


def test_an_exception_is_reported_and_leaves_the_span() -> None:
    seen: list[events.Event] = []
    unsubscribe = events.subscribe(seen.append)
    try:
        with pytest.raises(OSError, match="full"), events.record("write"):
            raise OSError("full")
    finally:
        unsubscribe()
    assert [event.kind for event in seen] == ["start", "exception"]
    assert isinstance(seen[1].error, OSError)
    assert seen[1].as_dict()["error"] == "full"


def test_the_end_of_a_subscription_ends_the_events_and_may_be_repeated() -> None:
    seen: list[events.Event] = []
    first, second = events.subscribe(seen.append), events.subscribe(seen.append)
    first()
    first()
    with events.record("plan"):
        pass
    second()
    with events.record("plan"):
        pass
    assert len(seen) == 2


def test_a_failing_subscriber_neither_fails_the_span_nor_hides_it_from_others(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[events.Event] = []

    def fail(event: events.Event) -> None:
        raise RuntimeError("dashboard is down")

    ends = [events.subscribe(fail), events.subscribe(seen.append)]
    try:
        with events.record("commit"):
            pass
    finally:
        for end in ends:
            end()
    assert [event.kind for event in seen] == ["start", "end"]
    assert "a subscriber of dcp_plugins.events failed on commit/start" in caplog.text


def test_the_logger_gets_dicts_with_the_keys_that_torch_handlers_read(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger=events.LOGGER_NAME), events.record("save", planner="P"):
        pass
    start, end = (record.msg for record in caplog.records)
    assert isinstance(start, dict)
    assert isinstance(end, dict)
    assert start["func_name"] == end["func_name"] == "save"
    assert (start["event"], end["event"]) == ("start", "end")
    assert start["uuid"] == end["uuid"]
    assert start["planner"] == "P"
    assert end["times_spent"] >= 0


def test_nobody_listening_costs_about_a_microsecond_at_most() -> None:
    def span() -> None:
        with events.record("save", checkpoint_id="a"):
            pass

    best = min(timeit.repeat(span, number=10_000, repeat=5)) / 10_000
    # A quarter of a microsecond when measured alone; the bound leaves room for a loaded machine.
    assert best < 3e-6


def test_the_decorator_of_torchs_logger_module_reports_the_call(caplog: pytest.LogCaptureFixture) -> None:
    class Writer:
        checkpoint_id = "run/step-1"

    @logger._dcp_method_logger(log_exceptions=True)
    def save(state_dict: dict[str, int], *, storage_writer: object) -> int:
        if not state_dict:
            raise ValueError("nothing to save")
        return len(state_dict)

    with caplog.at_level(logging.DEBUG, logger=events.LOGGER_NAME):
        assert save({"a": 1}, storage_writer=Writer()) == 1
        with pytest.raises(ValueError, match="nothing"):
            save({}, storage_writer=Writer())
    messages = [record.msg for record in caplog.records]
    assert [message["event"] for message in messages] == ["start", "end", "start", "exception", "exception"]
    assert {message["checkpoint_id"] for message in messages} == {"run/step-1"}
    assert {message["storage_writer"] for message in messages} == {"Writer"}
    assert caplog.records[-1].levelno == logging.ERROR
    assert logging_handlers.DCP_LOGGER_NAME == "dcp_logger"
