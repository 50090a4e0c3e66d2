"""Files that nobody saved: programs, bombs, lies about sizes and places, and what is no file at all.

Each is put in the place of a file of a checkpoint, and loaded with the default options. The load returns, or raises an
error of the package. Code in a file never runs: it would create a canary. The time and the memory that the load takes
are bounded by the length of the file.
"""

from __future__ import annotations

import functools
import gc
import os
import pickle
import resource
import shutil
import socket
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import dcp_plugins as dcp
from dcp_plugins.errors import CheckpointError
from dcp_plugins.format.metadata import encode
from dcp_plugins.format.metadata_trailer import add_trailer, split_trailer
from dcp_plugins.manager import verify_checkpoint
from tests.torture.campaign import Campaign
from tests.torture.checkpoints import FORMATS, chosen, save_format
from tests.torture.children import Cost, check_in_children
from tests.torture.damage import own_causes
from tests.torture.hostile_files import INDEXES, JSON_TEXTS, SAFETENSORS, ZIPS
from tests.torture.hostile_pickles import PICKLES
from tests.torture.parsers import container_of, trailer_around

_ADDRESS_SPACE = 12 << 30

# Makes the bytes of a file from the path of the canary.
Content = Callable[[str], bytes]


@dataclass(frozen=True, slots=True)
class Hostile:
    """A hostile file in a checkpoint.

    Attributes:
        format: The format of the checkpoint.
        file: What it stands for.
        name: What it is.
        put: Puts it into a checkpoint's folder, given the path of the canary, and returns its length in bytes.
    """

    format: str
    file: str
    name: str
    put: Callable[[Path, str], int]

    def __str__(self) -> str:
        return f"{self.name} as {self.file} of {self.format}"


def run(campaign: Campaign) -> None:
    warnings.simplefilter("ignore")
    os.environ["HF_HUB_OFFLINE"] = "1"
    formats = chosen(campaign)
    by_file: dict[tuple[str, str], list[Hostile]] = {}
    for one in _corpus():
        if one.format in formats:
            by_file.setdefault((one.format, one.file), []).append(one)
    cases = [case for some in by_file.values() for case in campaign.pick(some)]
    for name in {case.format for case in cases}:
        save_format(campaign.folder, name)
    prepare = functools.partial(_Folders, campaign.folder)
    check_in_children(campaign, cases, lambda case: f"{case.file} of {case.format}", prepare, _check)


# Which file of which format. These are read by the decoder of values.
_SMALL_FILES = [
    ("lightning of stock", "meta.pt"),
    ("accelerate of stock", "scheduler.bin"),
    ("accelerate of stock", "optimizer.bin"),
    ("accelerate of stock", "random_states_0.pkl"),
]
_FILES = [
    *_SMALL_FILES,
    ("dcp, files", ".metadata"),
    ("dcp, files", "*.distcp"),
    ("dcp, without collectives", "__0.metadata"),
    ("safetensors, files", "model-00002-of-00002.safetensors"),
    ("safetensors, files", "model.safetensors.index.json"),
    ("manager", "step_2/.metadata"),
    ("manager", "step_2/*.distcp"),
    ("lightning of stock", ".metadata"),
    ("accelerate of stock", "model.safetensors"),
    ("trainer", "trainer_state.json"),
]
_PATHS = ["/etc/hostname", "../outside", "sub/../../outside", "C:\\x", "\\\\host\\x", "", ".", "..", "a\0b",
          "/dev/zero", "./.metadata", "a" * 5000, "\udc80", ".metadata"]  # fmt: skip


def _corpus() -> Iterator[Hostile]:
    for number, (name, pickled) in enumerate(PICKLES.items()):
        yield _replacing("dcp, files", ".metadata", name, pickled)
        yield _replacing("dcp, files", ".metadata", f"{name}, with a trailer", _with_trailer(pickled))
        yield _as_item("n", f"{name}, bare", pickled)
        for fqn in ("first", "n"):
            yield _as_item(fqn, name, _in_container(pickled))
        # A part of the pickles shows that these files are read by the same decoder.
        if number % 12 == 0 or "program" in name or "key" in name:
            for form, file in _SMALL_FILES:
                yield _replacing(form, file, name, _in_container(pickled))
    for name, content in ZIPS.items():
        for fqn in ("first", "n"):
            yield _as_item(fqn, f"zip: {name}", _constant(content))
        for form, file in _SMALL_FILES:
            yield _replacing(form, file, f"zip: {name}", _constant(content))
    for name, content in SAFETENSORS.items():
        yield _replacing("safetensors, files", "model-00002-of-00002.safetensors", name, _constant(content))
        yield _replacing("accelerate of stock", "model.safetensors", name, _constant(content))
    for name, content in INDEXES.items():
        yield _replacing("safetensors, files", "model.safetensors.index.json", name, _constant(content))
    for name, content in JSON_TEXTS.items():
        yield _replacing("trainer", "trainer_state.json", name, _constant(content))
        yield Hostile("dcp, files", ".metadata", f"extras: {name}", functools.partial(_put_extras, content))
    for form, file in _FILES:
        for name, make in _SPECIAL.items():
            yield Hostile(form, file, name, functools.partial(_put_special, file, make))
    for name in _PATHS:
        yield Hostile("dcp, files", "the path of first", repr(name)[:80], functools.partial(_put_path, name))


def _constant(make: Callable[[], bytes]) -> Content:
    return lambda canary: make()


def _in_container(pickled: Content) -> Content:
    return lambda canary: container_of(pickled(canary))


def _with_trailer(pickled: Content) -> Content:
    return lambda canary: add_trailer(pickled(canary), {"marked_files": True})


def _replacing(form: str, file: str, name: str, content: Content) -> Hostile:
    def put(folder: Path, canary: str) -> int:
        return _found(folder, file).write_bytes(content(canary))

    return Hostile(form, file, name, put)


def _as_item(fqn: str, name: str, content: Content) -> Hostile:
    """Let the metadata name a file as the stored tensor ``first`` or the stored value ``n``."""

    def put(folder: Path, canary: str) -> int:
        length = (folder / "c" / "hostile.distcp").write_bytes(content(canary))
        _place(folder, fqn, ("hostile.distcp", 0, length))
        return length

    return Hostile("dcp, files", fqn, name, put)


def _put_extras(text: Callable[[], bytes], folder: Path, canary: str) -> int:
    path = _found(folder, ".metadata")
    return path.write_bytes(trailer_around(split_trailer(path.read_bytes(), "")[0], text()))


def _put_path(name: str, folder: Path, canary: str) -> int:
    _place(folder, "first", (name, 0, 100))
    return 0


def _put_special(file: str, make: Callable[[Path], object], folder: Path, canary: str) -> int:
    path = _found(folder, file)
    path.unlink()
    make(path)
    return path.lstat().st_size


def _found(folder: Path, pattern: str) -> Path:
    return next(path for path in sorted(folder.rglob("*")) if path.match(pattern) and path.is_file())


def _place(folder: Path, fqn: str, place: tuple[str, int, int]) -> None:
    path = folder / "c" / ".metadata"
    metadata = pickle.loads(split_trailer(path.read_bytes(), "")[0])
    for index, info in metadata.storage_data.items():
        if index.fqn == fqn:
            metadata.storage_data[index] = type(info)(*place)
    path.write_bytes(encode(metadata))


# What is no file.


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        # An address of this kind has a hundred bytes at most.
        os.chdir(path.parent)
        made.bind(path.name)
        os.chdir("/")


def _link_outside(path: Path) -> None:
    outside = path.parents[3] / "outside"
    outside.write_bytes(b"secret")
    path.symlink_to(outside)


def _without_permission(path: Path) -> None:
    path.write_bytes(b"x")
    path.chmod(0)


def _of_holes(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 34)


_SPECIAL: dict[str, Callable[[Path], object]] = {
    "a named pipe": os.mkfifo,
    "a socket": _socket,
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a link to /dev/tty": lambda path: path.symlink_to("/dev/tty"),
    "a link to a file outside": _link_outside,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a directory": Path.mkdir,
    "a file without permission": _without_permission,
    "a file of holes": _of_holes,
}


# One case.


class _Folders:
    """The checkpoints of one child."""

    def __init__(self, root: Path, folder: Path) -> None:
        resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
        self.root = root
        self.folder = folder
        self.canary = folder / "canary"
        self._known: set[str] = set()

    def fresh(self, name: str) -> Path:
        """Return a folder with the checkpoint as it was saved."""
        folder = self.folder / "checkpoints" / name
        if name not in self._known:
            self._known.add(name)
            # Import what is imported by the first load.
            FORMATS[name].load(self.root / name)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.root / name, folder)
        return folder


def _check(folders: _Folders, case: Hostile) -> None:
    folder = folders.fresh(case.format)
    length = case.put(folder, str(folders.canary))
    excess = ""
    for load in _loads_of(case):
        cost = Cost()
        _loads_or_refuses(load, folder, is_short=length < _ADDRESS_SPACE)
        excess = excess or cost.excess(length)
        # An error and the frames that it went through hold each other, and what was read.
        gc.collect()
    if folders.canary.exists():
        folders.canary.rmdir() if folders.canary.is_dir() else folders.canary.unlink()
        raise AssertionError("code in the file ran")
    assert not excess, excess


def _loads_of(case: Hostile) -> list[Callable[[Path], Any]]:
    loads = [FORMATS[case.format].load]
    if case.format == "dcp, files":
        loads.append(lambda folder: dcp.load_from_keys(checkpoint_id=folder / "c"))
        loads.append(lambda folder: verify_checkpoint(folder / "c"))
    return loads


def _loads_or_refuses(load: Callable[[Path], Any], folder: Path, *, is_short: bool) -> None:
    loaded: Any = None
    refused: Exception | None = None
    try:
        loaded = load(folder)
    except (CheckpointError, OSError) as exc:
        refused = exc
    if isinstance(refused, CheckpointError):
        short_of_memory = any(map(_is_of_memory, own_causes(refused)))
        assert not (is_short and short_of_memory), f"the memory did not suffice: {refused}"
    elif refused is not None:
        # The system's own error, about the file that is there.
        assert refused.filename is not None, repr(refused)
        assert folder in Path(os.fsdecode(refused.filename)).parents, repr(refused)
    # Some values would harm when they are read or freed.
    for value in loaded.values() if isinstance(loaded, dict) else ():
        if isinstance(value, torch.Tensor) and value.numel() < 1 << 20:
            value.clone()


def _is_of_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        error = error.__cause__
    return False
