"""Neighbours: others that read, write and delete beside a save, and systems that have too little of something.

What is promised: a load gives one whole checkpoint or an error of this package; a save returns or raises one; the
checkpoint that is held is whole; a fault that has passed leaves nothing behind that the next save does not reclaim.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

import dcp_plugins as dcp
from dcp_plugins.engine import AsyncCheckpointerType
from dcp_plugins.errors import CheckpointError
from dcp_plugins.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from dcp_plugins.manager import CheckpointManager, KeepLatest
from dcp_plugins.testing.ranks import RankError, run_ranks
from tests.torture import namespace
from tests.torture.campaign import Campaign

ROWS = 64
Case = tuple[str, str, Callable[[Path], None]]
"""What kind it is, its name, and what to do in a process of its own, with an empty directory; it raises if it fails."""


def state_of(seed: int, rows: int = ROWS) -> dict[str, Any]:
    return {"w": torch.full((rows, 64), float(seed)), "b": torch.full((33,), float(seed))}


def save(folder: str | Path, seed: int, mode: str = "sync", rows: int = ROWS) -> None:
    state = {**state_of(seed, rows), "seed": seed}
    if mode == "sync":
        dcp.save(state, checkpoint_id=folder, no_dist=True)
        return
    kind = AsyncCheckpointerType(mode)
    dcp.async_save(state, checkpoint_id=folder, async_checkpointer_type=kind, no_dist=True).result()  # type: ignore[union-attr]


def held(folder: str | Path, rows: int = ROWS) -> int:
    """Return the seed of the checkpoint that loads, having checked that it is one whole checkpoint."""
    target = {**state_of(-1, rows), "seed": -1}
    dcp.load(target, checkpoint_id=folder, no_dist=True)
    return _seed_of(target, int(target["seed"]))


def _seed_of(target: dict[str, Any], seed: int) -> int:
    for name, value in state_of(seed, target["w"].shape[0]).items():
        assert torch.equal(target[name], value), f"{name} is not of save {seed}: {target[name].unique()}"
    return seed


def check_recovers(folder: str | Path, rows: int = ROWS) -> None:
    """Check that the next save succeeds, and reclaims what the fault left behind."""
    save(folder, 99, rows=rows)
    assert held(folder, rows) == 99
    metadata = dcp.FileSystemReader(folder).read_metadata()
    named = {info.relative_path for info in metadata.storage_data.values()}
    assert set(os.listdir(folder)) == named | {".metadata"}, sorted(os.listdir(folder))


@contextlib.contextmanager
def beside(work: Callable[[], None]) -> Iterator[int]:
    """Do something again and again in a forked process, to the end of the block; it must not fail."""
    pid = os.fork()
    if pid == 0:
        status = 1
        with contextlib.suppress(BaseException):
            os.setpgid(0, 0)
            while True:
                work()
        os._exit(status)
    try:
        yield pid
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the process beside has failed"
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


class Counter:
    def __init__(self) -> None:
        self.number = 0

    def __call__(self) -> int:
        self.number += 1
        return self.number


# -- Others that read, write and delete ------------------------------------------------------------------------------


def read_beside_overwrites(seconds: float, mode: str, folder: Path) -> None:
    checkpoint, counter = folder / "c", Counter()
    save(checkpoint, counter())
    with beside(lambda: save(checkpoint, counter(), mode)):
        _load_for(seconds, partial(held, checkpoint))


def read_safetensors_beside_overwrites(seconds: float, folder: Path) -> None:
    checkpoint, counter = folder / "c", Counter()

    def write() -> None:
        dcp.save(state_of(counter()), storage_writer=HuggingFaceStorageWriter(checkpoint), no_dist=True)

    def read() -> int:
        target = state_of(-1)
        dcp.load(target, storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=True)
        return _seed_of(target, int(target["b"][0]))

    write()
    with beside(write):
        _load_for(seconds, read)


def _load_for(seconds: float, load: Callable[[], int]) -> None:
    """Load again and again: one whole checkpoint each time, none older than the one before, or an error of ours."""
    deadline, newest, loads, errors = time.monotonic() + seconds, 0, 0, 0
    while time.monotonic() < deadline:
        try:
            seed = load()
            assert seed >= newest, f"after save {newest} the load gave save {seed}"
            newest, loads = seed, loads + 1
        except CheckpointError:
            errors += 1
    assert loads, f"none of {errors} loads gave a checkpoint"


def restore_beside_deletions(seconds: float, keep: int, folder: Path) -> None:
    counter = Counter()

    def manager() -> CheckpointManager:
        return CheckpointManager(folder, keep_policy=KeepLatest(keep), no_dist=True)

    def save_with(writing: CheckpointManager) -> None:
        step = counter()
        writing.save(step, {**state_of(step), "seed": step})

    def write() -> None:
        with manager() as writing:
            for _ in range(5):
                save_with(writing)

    write()
    reading = manager()
    with beside(write):
        deadline = time.monotonic() + seconds
        newest = 0
        while time.monotonic() < deadline:
            target = {**state_of(-1), "seed": -1}
            step = reading.restore(target)
            assert step is not None
            assert step >= newest
            newest = step
            assert _seed_of(target, int(target["seed"])) == step


def two_jobs(seconds: float, modes: tuple[str, str], folder: Path) -> None:
    checkpoint = folder / "c"
    first, second = Counter(), Counter()
    save(checkpoint, 0)

    def attempt(seed: int, mode: str) -> None:
        with contextlib.suppress(CheckpointError):
            save(checkpoint, seed, mode)

    def write_first() -> None:
        attempt(2 * first(), modes[0])

    def write_second() -> None:
        attempt(2 * second() + 1, modes[1])

    with beside(write_first), beside(write_second):
        deadline, loads = time.monotonic() + seconds, 0
        while time.monotonic() < deadline:
            with contextlib.suppress(CheckpointError):
                held(checkpoint)
                loads += 1
        assert loads
    held(checkpoint)
    check_recovers(checkpoint)


# -- Forked children --------------------------------------------------------------------------------------------------


def fork_in_a_save(mode: str, end: str, folder: Path) -> None:
    """Fork while a save is in flight; the child saves for itself, or only ends."""
    save(folder / "first", 1, mode)
    kind = AsyncCheckpointerType(mode)
    state = {**state_of(2), "seed": 2}
    future = dcp.async_save(state, checkpoint_id=folder / "c", async_checkpointer_type=kind, no_dist=True)
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            if end == "saves":
                save(folder / "child", 3, mode)
                assert held(folder / "child") == 3
            elif end == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if end == "exits":
                sys.exit(0)
            os._exit(0)
        os._exit(0 if end == "exits" else 1)
    status = os.waitpid(pid, 0)[1]
    assert status == (signal.SIGKILL if end == "dies" else 0), f"the child ended with {status}"
    future.result()  # type: ignore[union-attr]
    assert held(folder / "c") == 2
    # What this process has was not the child's to end.
    save(folder / "c", 4, mode)
    assert held(folder / "c") == 4


def load_data_in_workers(mode: str, folder: Path) -> None:
    kind = AsyncCheckpointerType(mode)
    data = TensorDataset(torch.arange(24.0))
    total = 0.0
    for epoch in range(2):
        for number, (batch,) in enumerate(DataLoader(data, batch_size=4, num_workers=2)):
            total += float(batch.sum())
            seed = 10 * epoch + number
            state = {**state_of(seed), "seed": seed}
            future = dcp.async_save(state, checkpoint_id=folder / "c", async_checkpointer_type=kind, no_dist=True)
        future.result()  # type: ignore[union-attr]
        assert held(folder / "c") == 10 * epoch + 5
    assert total == 2 * sum(range(24))


# -- Too little of something -----------------------------------------------------------------------------------------


def attempt_save(folder: Path, mode: str, rows: int = ROWS, old: int = 1) -> bool:
    """Try to save over a checkpoint, and return whether that succeeded; the old one is held if it did not."""
    try:
        save(folder, 2, mode, rows)
    except CheckpointError:
        return False
    # What a system call without this package's help would raise too.
    except OSError:
        return False
    return True


def few_descriptors(limit: int, mode: str, folder: Path) -> None:
    checkpoint = folder / "c"
    save(checkpoint, 1, mode)
    held(checkpoint)
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Above the lowest numbers that are free, as if the process had opened so many files already.
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, usual[1]))
    try:
        has_saved = attempt_save(checkpoint, mode)
        try:
            assert held(checkpoint) == (2 if has_saved else 1)
        except (CheckpointError, OSError) as exc:
            if "Too many open files" not in str(exc):
                raise
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, usual)
    assert held(checkpoint) == (2 if has_saved else 1)
    check_recovers(checkpoint)


def little_room(nbytes: int, mode: str, folder: Path) -> None:
    """A disk on which there is room for one checkpoint, and for a part of a second one, or for all of it."""
    namespace.use_own_mounts()
    namespace.mount_small(folder, nbytes)
    rows, checkpoint = 4096, folder / "c"
    save(checkpoint, 1, mode, rows)
    for _ in range(3):
        has_saved = attempt_save(checkpoint, mode, rows)
        assert held(checkpoint, rows) == (2 if has_saved else 1)
        if has_saved:
            break
        metadata = dcp.FileSystemReader(checkpoint).read_metadata()
        named = {info.relative_path for info in metadata.storage_data.values()}
        assert set(os.listdir(checkpoint)) == named | {".metadata"}, "a failed save leaves files on a full disk"


def disk_that_fills_up(left: int, mode: str, folder: Path) -> None:
    """A disk that another program fills to its last bytes."""
    namespace.use_own_mounts()
    namespace.mount_small(folder, 8 * 2**20)
    checkpoint = folder / "c"
    save(checkpoint, 1, mode)
    with contextlib.suppress(OSError), (folder / "other").open("wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass
    if left:
        os.truncate(folder / "other", (folder / "other").stat().st_size - left)
    has_saved = attempt_save(checkpoint, mode)
    assert held(checkpoint) == (2 if has_saved else 1)
    (folder / "other").unlink()
    check_recovers(checkpoint)


def short_files(limit: int, mode: str, folder: Path) -> None:
    """A limit on the size of files, as a quota may set one."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    checkpoint = folder / "c"
    save(checkpoint, 1, mode)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    has_saved = attempt_save(checkpoint, mode)
    assert held(checkpoint) == (2 if has_saved else 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    check_recovers(checkpoint)


def full_shared_memory(nbytes: int, mode: str, folder: Path) -> None:
    namespace.use_own_mounts()
    namespace.mount_small("/dev/shm", nbytes)
    checkpoint = folder / "c"
    save(checkpoint, 1, "sync")
    has_saved = attempt_save(checkpoint, mode)
    assert held(checkpoint) == (2 if has_saved else 1)
    assert not os.listdir("/dev/shm")
    check_recovers(checkpoint)


def read_only(mode: str, how: str, folder: Path) -> None:
    checkpoint = folder / "c"
    save(checkpoint, 1)
    if how == "mount":
        namespace.use_own_mounts()
        namespace.make_read_only(folder)
    else:
        folder.chmod(0o755)
        checkpoint.chmod(0o555)
        os.setegid(65534)
        os.seteuid(65534)
    assert not attempt_save(checkpoint, mode)
    assert held(checkpoint) == 1
    assert not attempt_save(folder / "new", mode)
    assert not (folder / "new").exists()
    if how != "mount":
        os.seteuid(0)
        os.setegid(0)
        checkpoint.chmod(0o755)
        check_recovers(checkpoint)


# -- Odd places --------------------------------------------------------------------------------------------------------

LONG_NAME = "n" * 255
GOOD_PLACES = {
    "newline": "a\nb",
    "other letters": "Prüfpunkt-检查点-🧭",
    "quotes and blanks": " 'a' \"b\" $HOME `c` \\n ",
    "longest name": LONG_NAME,
    "longest path": "/".join(["p" * 200] * 15),
    "trailing slash": "slash/",
    "two slashes": "two//slashes//",
    "dots": "x/../dots/./here",
    "a tilde is a name": "~",
    "percent": "100%s{}%",
    "bytes that are no text": os.fsdecode(b"latin-\xe9"),
    "a hyphen first": "-rf",
}
BAD_PLACES = {
    "a name that is too long": "n" * 256,
    "a path that is too long": "/".join(["p" * 200] * 25),
    "below a device": "/dev/null/x",
    "a device": "/dev/null",
    "below a file": "file/c",
    "a file": "file",
    "a dangling link below": "dangling/c",
    "a link to itself": "loop",
    "below the kernel": "/proc/self/c",
    "a NUL": "a\0b",
}


def good_place(name: str, mode: str, folder: Path) -> None:
    os.chdir(folder)
    for seed in (1, 2):
        save(name, seed, mode)
        assert held(name) == seed
    assert held(folder / name) == 2
    check_recovers(name)


def elsewhere_meanwhile(mode: str, folder: Path) -> None:
    """A relative path means what it meant at the call."""
    (folder / "here").mkdir()
    (folder / "there").mkdir()
    os.chdir(folder / "here")
    kind = AsyncCheckpointerType(mode)
    state = {**state_of(1), "seed": 1}
    future = dcp.async_save(state, checkpoint_id="c", async_checkpointer_type=kind, no_dist=True)
    os.chdir(folder / "there")
    future.result()  # type: ignore[union-attr]
    assert held(folder / "here" / "c") == 1
    assert not os.listdir(folder / "there")


def through_a_link(mode: str, folder: Path) -> None:
    (folder / "real").mkdir()
    (folder / "link").symlink_to("real")
    save(folder / "link" / "c", 1, mode)
    assert held(folder / "real" / "c") == 1
    (folder / "to-c").symlink_to("real/c")
    save(folder / "to-c", 2, mode)
    assert held(folder / "real" / "c") == 2
    assert (folder / "to-c").is_symlink()


def bad_place(name: str, mode: str, folder: Path) -> None:
    os.chdir(folder)
    Path("file").write_text("the user's")
    Path("dangling").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    before = sorted(os.listdir(folder))
    for attempt in (partial(save, name, 1, mode), partial(held, name)):
        try:
            attempt()
        except (CheckpointError, OSError, ValueError):
            continue
        raise AssertionError(f"{attempt} raised nothing")
    assert Path("file").read_text() == "the user's"
    assert sorted(os.listdir(folder)) == before


def cases(seconds: float) -> Iterator[Case]:
    modes = ("sync", "thread", "process")
    quick = ("sync", "thread")
    for mode in modes:
        yield "reader beside overwrites", mode, partial(read_beside_overwrites, seconds, mode)
    yield "reader beside overwrites", "safetensors", partial(read_safetensors_beside_overwrites, seconds)
    for keep in (1, 2):
        yield "restore beside deletions", f"keep {keep}", partial(restore_beside_deletions, seconds, keep)
    for pair in (("sync", "sync"), ("sync", "thread"), ("thread", "process")):
        yield "two jobs in one directory", str(pair), partial(two_jobs, seconds, pair)
    for mode in ("thread", "process"):
        for end in ("ends", "exits", "dies", "saves"):
            yield "forked child", f"{mode}, {end}", partial(fork_in_a_save, mode, end)
        yield "workers that load data", mode, partial(load_data_in_workers, mode)
    for mode in quick:
        for limit in range(3, 65, 1 if mode == "sync" else 4):
            yield "few descriptors", f"{mode}, {limit}", partial(few_descriptors, limit, mode)
        for limit in (0, 1, 1000, 10_000, 16_384, 17_000, 20_000):
            yield "limit of file size", f"{mode}, {limit}", partial(short_files, limit, mode)
        yield "read-only", f"{mode}, mode bits", partial(read_only, mode, "mode bits")
    for limit in (16, 32, 64):
        yield "few descriptors", f"process, {limit}", partial(few_descriptors, limit, "process")
    for mode in modes:
        for name, place in GOOD_PLACES.items():
            if mode != "process" or name in ("newline", "other letters", "bytes that are no text"):
                yield "odd place", f"{mode}, {name}", partial(good_place, place, mode)
        for name, place in BAD_PLACES.items():
            if mode != "process" or name in ("below a file", "a NUL"):
                yield "impossible place", f"{mode}, {name}", partial(bad_place, place, mode)
        yield "odd place", f"{mode}, through a link", partial(through_a_link, mode)
        if mode != "sync":
            yield "odd place", f"{mode}, elsewhere meanwhile", partial(elsewhere_meanwhile, mode)
    if not namespace.is_available():
        return
    for mode in modes:
        # A checkpoint takes a little more than 1 MB.
        for nbytes in (1_200_000, 1_700_000, 2_000_000, 2_200_000, 2_600_000):
            yield "little room", f"{mode}, {nbytes}", partial(little_room, nbytes, mode)
        for left in (0, 4096, 8192, 16_384, 24_576, 32_768):
            yield "full disk", f"{mode}, {left} bytes left", partial(disk_that_fills_up, left, mode)
        for nbytes in (4096, 65_536):
            yield "full /dev/shm", f"{mode}, {nbytes}", partial(full_shared_memory, nbytes, mode)
        yield "read-only", f"{mode}, mount", partial(read_only, mode, "mount")


def _attempt(case: Callable[[Path], None], folder: str) -> None:
    warnings.simplefilter("ignore")
    case(Path(folder))


def run(campaign: Campaign) -> None:
    # A part of the time is enough for a part of the cases.
    seconds = 20.0 if campaign.share == 1.0 else 1.5
    for number, (kind, name, case) in enumerate(campaign.pick(list(cases(seconds)))):
        folder = campaign.folder / str(number)
        folder.mkdir()
        with campaign.case(kind, name):
            try:
                run_ranks(1, _attempt, case, str(folder), timeout_seconds=180)
            except RankError as exc:
                raise AssertionError(str(exc)[-3000:]) from None
