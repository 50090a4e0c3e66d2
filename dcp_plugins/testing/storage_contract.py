"""What any storage must do: a suite that every pair of a ``StorageWriter`` and a ``StorageReader`` has to pass.

Derive from ``StorageContract`` in a test module that pytest collects, and say how a writer and a reader are made::

    class TestMyStorage(StorageContract):
        def make_writer(self, checkpoint_id):
            return MyWriter(checkpoint_id)

        def make_reader(self, checkpoint_id):
            return MyReader(checkpoint_id)

        def new_id(self, tmp_path):
            return f"mine://{tmp_path}/checkpoint"

Each test names what it asks for; an attribute of the class that is False skips what a storage does not promise.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dcp_plugins.contract import StorageReader, StorageWriter, WriteItem
from dcp_plugins.engine import load, load_from_keys, save
from dcp_plugins.errors import CheckpointException, UnreadValuesWarning
from dcp_plugins.plan import DefaultLoadPlanner, DefaultSavePlanner
from dcp_plugins.testing.ranks import run_ranks

__all__ = ["StorageContract"]

CheckpointId = str | os.PathLike[str]
State = dict[str, Any]


class StorageContract:
    """The suite; every method whose name starts with ``test_`` is one claim about the storage.

    ``make_writer`` and ``make_reader`` are called in this process and, pickled with the object, on ranks of their
    own: the class has to be at the top of its module.
    """

    holds_bytes = True
    """Whether the storage takes values that are not tensors."""
    replaces = True
    """Whether a save under an id that is taken replaces what is there."""
    replaces_safely = True
    """Whether a save that fails leaves what was committed under the same id before."""
    holds_views = True
    """Whether tensors that share memory, or are not contiguous, are stored like any others."""
    dtypes: tuple[torch.dtype, ...] = (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.complex64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    )
    """The dtypes it takes."""

    def make_writer(self, checkpoint_id: CheckpointId) -> StorageWriter:
        """Return a new writer for the id."""
        raise TypeError(f"{type(self).__name__} must define make_writer")

    def make_reader(self, checkpoint_id: CheckpointId) -> StorageReader:
        """Return a new reader for the id."""
        raise TypeError(f"{type(self).__name__} must define make_reader")

    def new_id(self, tmp_path: Path) -> CheckpointId:
        """Return an id below a directory of this test's own."""
        return tmp_path / "checkpoint"

    def save(self, checkpoint_id: CheckpointId, state: State, **options: Any) -> None:
        """Save with a new writer."""
        with _quiet():
            save(state, storage_writer=self.make_writer(checkpoint_id), **options)

    def load(self, checkpoint_id: CheckpointId, target: State, **options: Any) -> State:
        """Load with a new reader and return the target."""
        with _quiet():
            load(target, storage_reader=self.make_reader(checkpoint_id), **options)
        return target

    def state(self, seed: int = 0) -> State:
        """Return a small nested state that depends on ``seed``."""
        values: State = {
            "model": {"weight": _bytes_as(torch.float32, (5, 7), seed), "bias": torch.arange(7.0) + seed},
            "scalar": torch.tensor(float(seed)),
            "empty": torch.empty(0, 3),
        }
        if self.holds_bytes:
            values |= {"epoch": seed, "note": [f"seed {seed}", 0.1]}
        return values

    def blank(self) -> State:
        """Return a target for ``state``."""
        target: State = {
            "model": {"weight": torch.zeros(5, 7), "bias": torch.zeros(7)},
            "scalar": torch.tensor(0.0),
            "empty": torch.empty(0, 3),
        }
        return target | ({"epoch": None, "note": None} if self.holds_bytes else {})

    def test_a_state_comes_back_bit_for_bit(self, tmp_path: Path) -> None:
        """Nested tensors and values are the same after a save and a load."""
        where = self.new_id(tmp_path)
        self.save(where, self.state(3))
        _assert_same(self.load(where, self.blank()), self.state(3))

    def test_every_dtype_comes_back_bit_for_bit(self, tmp_path: Path) -> None:
        """All bit patterns of every dtype survive, not-a-numbers included."""
        where = self.new_id(tmp_path)
        state: State = {str(dtype): _bytes_as(dtype, (3, 5), 1) for dtype in self.dtypes}
        self.save(where, state)
        _assert_same(self.load(where, {key: torch.zeros_like(value) for key, value in state.items()}), state)

    def test_tensors_of_any_memory_layout_come_back(self, tmp_path: Path) -> None:
        """Views, permuted and strided tensors are stored by their values."""
        if not self.holds_views:
            return
        where = self.new_id(tmp_path)
        base = torch.arange(60.0).reshape(6, 10)
        state: State = {"whole": base, "part": base[1:3], "t": base.t(), "step": base[::2, ::3], "wide": base[:1]}
        self.save(where, state)
        _assert_same(self.load(where, {key: torch.zeros(value.shape) for key, value in state.items()}), state)
        strided = torch.zeros(10, 6).t()
        self.load(where, {"whole": strided})
        assert torch.equal(strided, base)

    def test_a_part_of_the_keys_loads_alone(self, tmp_path: Path) -> None:
        """A target with fewer keys than the checkpoint is filled, and nothing else is needed."""
        where = self.new_id(tmp_path)
        self.save(where, self.state(3))
        with warnings.catch_warnings():
            # The test leaves the other keys on purpose.
            warnings.simplefilter("ignore", UnreadValuesWarning)
            target = self.load(where, {"model": {"bias": torch.zeros(7)}})
        _assert_same(target, {"model": {"bias": self.state(3)["model"]["bias"]}})

    def test_a_checkpoint_is_rebuilt_without_a_target(self, tmp_path: Path) -> None:
        """The metadata alone says enough to rebuild the tensors."""
        where = self.new_id(tmp_path)
        self.save(where, self.state(4))
        with _quiet():
            found = load_from_keys(storage_reader=self.make_reader(where))
        assert torch.equal(_flat(found)["model.bias"], self.state(4)["model"]["bias"])

    def test_shards_are_loaded_as_other_shards(self, tmp_path: Path) -> None:
        """Any box of a tensor can be read out of any boxes that were saved."""
        where = self.new_id(tmp_path)
        whole = torch.arange(60.0).reshape(10, 6)
        self.save(where, {"w": _rows_of(whole, [(0, 3), (3, 4), (7, 3)])})
        assert torch.equal(self.load(where, {"w": torch.zeros(10, 6)})["w"], whole)
        part = _rows_of(torch.zeros(10, 6), [(2, 6)])
        assert torch.equal(self.load(where, {"w": part})["w"], whole[2:8])

    def test_no_checkpoint_is_an_error(self, tmp_path: Path) -> None:
        """Loading where nothing was saved fails on the rank that asked."""
        assert _failure(lambda: self.load(self.new_id(tmp_path), self.blank())) is not None

    def test_two_ids_do_not_meet(self, tmp_path: Path) -> None:
        """What is saved under one id does not change what is under another."""
        first, second = (self.new_id(_made(tmp_path / name)) for name in ("a", "b"))
        self.save(first, self.state(1))
        self.save(second, self.state(2))
        _assert_same(self.load(first, self.blank()), self.state(1))
        _assert_same(self.load(second, self.blank()), self.state(2))

    def test_a_second_save_replaces_the_first(self, tmp_path: Path) -> None:
        """Under the same id the last committed save is what loads, whole, with no key of the one before."""
        if not self.replaces:
            return
        where = self.new_id(tmp_path)
        self.save(where, {**self.state(1), "old": torch.ones(3)})
        self.save(where, self.state(2))
        _assert_same(self.load(where, self.blank()), self.state(2))
        assert _failure(lambda: self.load(where, {"old": torch.zeros(3)})) is not None

    def test_a_writer_and_a_reader_are_used_again(self, tmp_path: Path) -> None:
        """After ``reset`` both serve another id; without it, the same one again."""
        first, second = (self.new_id(_made(tmp_path / name)) for name in ("a", "b"))
        writer, reader = self.make_writer(first), self.make_reader(first)
        with _quiet():
            for seed, where in ((1, first), (2, second)):
                save(self.state(seed), checkpoint_id=where, storage_writer=writer)
            if self.replaces:
                save(self.state(3), storage_writer=writer)
            for seed, where in ((1, first), (3 if self.replaces else 2, second)):
                target = self.blank()
                load(target, checkpoint_id=where, storage_reader=reader)
                _assert_same(target, self.state(seed))

    def test_a_failing_save_is_an_error_and_no_checkpoint(self, tmp_path: Path) -> None:
        """A failure in mid-write is raised, and what it left behind does not load."""
        where = self.new_id(tmp_path)
        failure = _failure(lambda: self.save(where, self.state(1), planner=_FailingPlanner(after=2)))
        assert isinstance(failure, _InjectedError), failure
        assert _failure(lambda: self.load(where, self.blank())) is not None

    def test_a_failing_save_leaves_the_checkpoint_before_it(self, tmp_path: Path) -> None:
        """Replacing is all or nothing, and the next save succeeds."""
        if not (self.replaces and self.replaces_safely):
            return
        where = self.new_id(tmp_path)
        self.save(where, self.state(1))
        for after in (0, 2):
            assert _failure(lambda: self.save(where, self.state(2), planner=_FailingPlanner(after))) is not None  # noqa: B023
            _assert_same(self.load(where, self.blank()), self.state(1))
        self.save(where, self.state(3))
        _assert_same(self.load(where, self.blank()), self.state(3))

    def test_a_planner_sees_every_tensor_committed(self, tmp_path: Path) -> None:
        """A reader resolves a target, fills it and hands it to ``commit_tensor``, once for each read."""
        where = self.new_id(tmp_path)
        self.save(where, self.state(1))
        planner = _CopyingPlanner()
        _assert_same(self.load(where, self.blank(), planner=planner), self.state(1))
        assert sorted(planner.committed) == ["model.bias", "model.weight", "scalar"]

    def test_every_rank_writes_and_reads_its_part(self, tmp_path: Path) -> None:
        """Two ranks save shards, two others and a single process load them."""
        where = self.new_id(tmp_path)
        run_ranks(2, _save_shards, self, where)
        assert torch.equal(self.load(where, {"w": torch.zeros(9, 4)})["w"], _whole())
        run_ranks(2, _load_shards, self, where)

    def test_a_rank_that_fails_fails_the_save_on_all(self, tmp_path: Path) -> None:
        """No rank returns from a save in which another failed, and nothing is committed."""
        where = self.new_id(tmp_path)
        assert run_ranks(2, _fail_on_one, self, where) == [[1], [1]]
        assert _failure(lambda: self.load(where, {"w": torch.zeros(9, 4)})) is not None


class _InjectedError(RuntimeError):
    """Raised by the planner that fails on purpose."""


class _FailingPlanner(DefaultSavePlanner):
    """Fails when the writer asks for data, after some items."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self._left = after

    def resolve_data(self, write_item: WriteItem) -> Any:
        if self._left == 0:
            raise _InjectedError(f"injected: {write_item.index.fqn}")
        self._left -= 1
        return super().resolve_data(write_item)


class _CopyingPlanner(DefaultLoadPlanner):
    """Gives the reader a copy to fill, and takes it over when it is committed."""

    def __init__(self) -> None:
        super().__init__()
        self.committed: list[str] = []

    def resolve_tensor(self, read_item: Any) -> torch.Tensor:
        return super().resolve_tensor(read_item).clone()

    def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
        super().resolve_tensor(read_item).copy_(tensor)
        self.committed.append(read_item.dest_index.fqn)


def _whole() -> torch.Tensor:
    return torch.arange(36.0).reshape(9, 4)


def _shards_of_this_rank(contract: StorageContract, rank: int, *, fill: bool) -> State:
    whole = _whole() if fill else torch.zeros(9, 4)
    state: State = {"w": _rows_of(whole, [(0, 5)] if rank == 0 else [(5, 3), (8, 1)]), "replica": torch.ones(3) * fill}
    return state | ({"note": "same everywhere" if fill else None} if contract.holds_bytes else {})


def _save_shards(contract: StorageContract, where: CheckpointId) -> None:
    contract.save(where, _shards_of_this_rank(contract, torch.distributed.get_rank(), fill=True))


def _load_shards(contract: StorageContract, where: CheckpointId) -> None:
    other = 1 - torch.distributed.get_rank()
    found = contract.load(where, _shards_of_this_rank(contract, other, fill=False))
    _assert_same(found, _shards_of_this_rank(contract, other, fill=True))


def _fail_on_one(contract: StorageContract, where: CheckpointId) -> list[int]:
    rank = torch.distributed.get_rank()
    try:
        contract.save(
            where,
            _shards_of_this_rank(contract, rank, fill=True),
            planner=_FailingPlanner(after=0 if rank == 1 else -1),
        )
    except CheckpointException as exc:
        return sorted(exc.failures)
    return []


def _rows_of(whole: torch.Tensor, rows: list[tuple[int, int]]) -> torch.Tensor:
    """Return a local tensor that holds some runs of rows (start, count) of a global one."""
    local: Any = torch.cat([whole[start : start + count] for start, count in rows])
    rest = tuple(whole.shape[1:])
    begins = [sum(count for _, count in rows[:at]) for at in range(len(rows))]
    local.global_shape = tuple(whole.shape)
    local.global_offsets = tuple((start, *[0] * len(rest)) for start, _ in rows)
    local.local_offsets = tuple((begin, *[0] * len(rest)) for begin in begins)
    local.local_sizes = tuple((count, *rest) for _, count in rows)
    return local  # type: ignore[no-any-return]


def _bytes_as(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = (torch.arange(count) * 37 + seed * 11) % (2 if dtype is torch.bool else 251)
    return raw.to(torch.uint8).view(dtype).view(shape)


def _made(path: Path) -> Path:
    path.mkdir()
    return path


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide warnings that a save without distribution, or over an older one, is right to give."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        warnings.filterwarnings("ignore", message="Detected an existing checkpoint")
        yield


def _failure(call: Callable[[], object]) -> BaseException | None:
    """Return the first rank's failure, or None if ``call`` returned."""
    try:
        call()
    except CheckpointException as exc:
        return exc.failures[min(exc.failures)][0]
    return None


def _flat(value: Any, prefix: str = "") -> State:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        key: entry
        for name, inner in value.items()
        for key, entry in _flat(inner, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _assert_same(found: State, expected: State) -> None:
    one, other = _flat(found), _flat(expected)
    assert one.keys() == other.keys(), f"keys differ: {sorted(one.keys() ^ other.keys())}"
    for key, value in other.items():
        if isinstance(value, torch.Tensor):
            assert (one[key].dtype, one[key].shape) == (value.dtype, value.shape), key
            assert torch.equal(_raw(one[key]), _raw(value)), f"{key}: bits differ"
        else:
            assert one[key] == value, f"{key}: {one[key]!r} != {value!r}"


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
