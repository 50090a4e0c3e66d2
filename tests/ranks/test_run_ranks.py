"""What runs the ranks of the other tests: what it returns, and what it says of ranks that fail, die or do not meet."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dcp_plugins.testing import ranks
from dcp_plugins.testing.ranks import RankError, run_ranks


def _sum(of_all: int) -> float:
    value = torch.tensor(float(dist.get_rank() + of_all))
    dist.all_reduce(value)
    return value.item()


def _fail_on_odd_ranks() -> None:
    if dist.get_rank() % 2:
        raise ValueError(f"rank {dist.get_rank()} is odd")


def _die_on_rank_1() -> int:
    if dist.get_rank() == 1:
        os._exit(3)
    return dist.get_rank()


def test_results_come_in_the_order_of_ranks() -> None:
    assert run_ranks(4, _sum, 10) == [46.0] * 4


def test_every_failing_rank_is_named_with_its_traceback() -> None:
    with pytest.raises(RankError, match=r"(?s)\[rank 1\].*rank 1 is odd.*\[rank 3\].*rank 3 is odd") as info:
        run_ranks(4, _fail_on_odd_ranks)
    assert "[rank 0]" not in str(info.value)


def test_a_rank_that_dies_is_named_or_has_no_result() -> None:
    with pytest.raises(RankError, match=r"\[rank 1\] died with exit code 3"):
        run_ranks(2, _die_on_rank_1)
    assert run_ranks(2, _die_on_rank_1, expect_deaths=True) == [0, None]


@pytest.mark.parametrize("times", [2, 3])
def test_ranks_that_could_not_meet_are_started_again(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    start = ranks._start
    stores = []

    def start_elsewhere(world_size: int, store_path: str, *others: Any) -> Any:
        stores.append(store_path)
        # A folder is no store.
        path = os.path.dirname(store_path) if len(stores) <= times else store_path
        return start(world_size, path, *others)

    monkeypatch.setattr(ranks, "_start", start_elsewhere)
    if times == 3:
        with pytest.raises(RankError, match=r"(?s)could not meet, 3 times: \[rank \d\].*FileStore"):
            run_ranks(2, _sum, 0)
    else:
        assert run_ranks(2, _sum, 0) == [1.0, 1.0]
    assert len(set(stores)) == 3
