"""When to save and what to keep: policies are values, and a union does what any of its members does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import FrozenInstanceError
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcp_plugins.manager import (
    AtSteps,
    EveryMinutes,
    EverySteps,
    KeepBest,
    KeepEvery,
    KeepLatest,
    KeepNewerThan,
    KeepPolicy,
    SaveRecord,
    steps_to_delete,
)
from dcp_plugins.manager.retention import best_record


def due(policy: Any, seconds: float = 0.0, until: int = 13) -> list[int]:
    return [step for step in range(until) if policy.is_due(step, seconds)]


def test_steps_are_due_by_number_and_at_least_once() -> None:
    assert due(EverySteps(4)) == [4, 8, 12]
    assert due(AtSteps(0, 5)) == [0, 5]
    assert due(EverySteps(4) | AtSteps(1) | EverySteps(6)) == [1, 4, 6, 8, 12]
    assert not (EverySteps(4) | AtSteps(1)).uses_clock


def test_minutes_are_due_when_they_have_passed() -> None:
    assert due(EveryMinutes(2), seconds=119.9) == []
    assert due(EveryMinutes(2), seconds=120, until=2) == [0, 1]
    policy = AtSteps(3) | EveryMinutes(0.5)
    assert policy.uses_clock
    assert due(policy, 29) == [3]


def test_policies_are_equal_by_value_and_frozen() -> None:
    assert EverySteps(3) | AtSteps(2, 1) == EverySteps(3) | AtSteps(1, 2)
    assert KeepLatest(2) | (KeepEvery(5) | KeepBest(1, "loss")) == (KeepLatest(2) | KeepEvery(5)) | KeepBest(1, "loss")
    with pytest.raises(FrozenInstanceError):
        EverySteps(3).n = 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EverySteps(0), "n must be at least 1"),
        (lambda: EveryMinutes(math.nan), "minutes must be more than 0"),
        (lambda: AtSteps(3, -1), "steps must not be negative"),
        (lambda: KeepLatest(0), "k must be at least 1"),
        (lambda: KeepEvery(0), "n must be at least 1"),
        (lambda: KeepBest(1, "loss", "lowest"), "mode must be one of max, min"),
        (lambda: KeepNewerThan(timedelta(0)), "age must be more than 0"),
    ],
)
def test_impossible_policies_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


NOW = 1_000_000.0
RECORDS = [
    SaveRecord(1, NOW - 9000, {"loss": 0.1, "accuracy": 0.5}),
    SaveRecord(2, NOW - 7000, {"loss": 0.3, "accuracy": 0.9}),
    SaveRecord(3, NOW - 5000, {"loss": math.nan}),
    SaveRecord(4, None, {}),
    SaveRecord(5, NOW - 3000, {"loss": 0.3, "accuracy": 0.7}),
    SaveRecord(6, NOW - 1000, {"loss": 0.5, "accuracy": 0.6}),
]


@pytest.mark.parametrize(
    ("policy", "deleted"),
    [
        (None, []),
        (KeepLatest(2), [1, 2, 3, 4]),
        (KeepEvery(3), [1, 2, 4, 5]),
        (KeepBest(1, "loss"), [2, 3, 4, 5]),
        (KeepBest(2, "loss"), [2, 3, 4]),  # of equal ones the later
        (KeepBest(1, "accuracy", "max"), [1, 3, 4, 5]),
        (KeepBest(3, "nothing"), [1, 2, 3, 4, 5]),
        (KeepNewerThan(timedelta(hours=1)), [1, 2, 3]),  # of step 4 nobody knows when
        (KeepNewerThan(timedelta(hours=1)) | KeepBest(1, "loss") | KeepEvery(3), [2]),
    ],
)
def test_what_a_policy_lets_go(policy: KeepPolicy | None, deleted: list[int]) -> None:
    assert steps_to_delete(policy, RECORDS, now=NOW) == deleted
    assert steps_to_delete(policy, list(reversed(RECORDS)), now=NOW, protected=[2]) == [
        step for step in deleted if step != 2
    ]


def test_the_best_is_that_of_the_first_policy_that_names_a_metric() -> None:
    best = best_record(KeepLatest(1) | KeepBest(3, "accuracy", "max") | KeepBest(1, "loss"), RECORDS)
    assert best is not None
    assert best.step == 2
    assert best_record(KeepBest(3, "nothing"), RECORDS) is None
    assert best_record(KeepLatest(3), RECORDS) is None
    assert best_record(None, RECORDS) is None


numbers = st.integers(min_value=1, max_value=6)
policies = st.recursive(
    st.one_of(
        st.builds(KeepLatest, numbers),
        st.builds(KeepEvery, numbers),
        st.builds(KeepBest, numbers, st.sampled_from(["loss", "accuracy"]), st.sampled_from(["min", "max"])),
        st.builds(KeepNewerThan, st.timedeltas(min_value=timedelta(seconds=1), max_value=timedelta(hours=2))),
    ),
    lambda inner: st.builds(lambda left, right: left | right, inner, inner),
    max_leaves=5,
)
values = st.floats(allow_nan=True, width=16)
metrics = st.dictionaries(st.sampled_from(["loss", "accuracy"]), values)
records = st.lists(
    st.builds(SaveRecord, st.integers(0, 40), st.none() | st.floats(NOW - 9000, NOW), metrics),
    unique_by=lambda record: record.step,
    max_size=12,
)


@given(left=policies, right=policies, saved=records, protected=st.sets(st.integers(0, 40), max_size=3))
def test_a_union_deletes_nothing_that_a_member_keeps(
    left: KeepPolicy, right: KeepPolicy, saved: Sequence[SaveRecord], protected: set[int]
) -> None:
    deleted = set(steps_to_delete(left | right, saved, now=NOW, protected=protected))
    alone = [set(steps_to_delete(policy, saved, now=NOW, protected=protected)) for policy in (left, right)]
    assert deleted == alone[0] & alone[1]
    assert not deleted & protected
    assert deleted <= {record.step for record in saved}
    if saved:
        assert max(record.step for record in saved) not in deleted


@given(policy=policies, saved=records)
def test_what_is_kept_stays_kept_when_the_rest_is_gone(policy: KeepPolicy, saved: Sequence[SaveRecord]) -> None:
    deleted = steps_to_delete(policy, saved, now=NOW)
    left = [record for record in saved if record.step not in deleted]
    assert steps_to_delete(policy, left, now=NOW) == []
