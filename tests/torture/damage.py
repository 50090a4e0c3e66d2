"""Every byte: each file of a small checkpoint of every format is damaged in every place, and loaded.

A load of damaged files gives exactly what was saved, or raises an error of the package that names a damaged file. It
never raises anything else, never hangs, never crashes the interpreter, and never gives other values where a checksum
covers the damage.
"""

from __future__ import annotations

import fnmatch
import functools
import itertools
import os
import random
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import dcp_plugins as dcp
from dcp_plugins.errors import CheckpointError, CheckpointNotFoundError
from tests.interop.values import assert_same
from tests.torture.campaign import Campaign
from tests.torture.checkpoints import FORMATS, State, chosen, contents, save_format
from tests.torture.children import check_in_children

_BLOCK_BYTES = 64


@dataclass(frozen=True, slots=True)
class Damage:
    """One damage to one checkpoint.

    Attributes:
        at: A position in the file, or a number of bytes, as the kind has it.
        other: The second file of two that change places.
    """

    format: str
    kind: str
    file: str
    at: int = 0
    other: str = ""

    def __str__(self) -> str:
        return f"{self.format}: {self.file} {self.kind}, {self.other or self.at}"

    def applied(self, good: dict[str, bytes]) -> dict[str, bytes | None]:
        """Return the new contents of the files that are damaged; None for a file that is deleted."""
        content, at = good[self.file], self.at
        noise = random.Random(str(self))
        end = min(at + _BLOCK_BYTES, len(content))
        match self.kind:
            case "with a flipped bit":
                changed = content[:at] + bytes((content[at] ^ 1 << noise.randrange(8),)) + content[at + 1 :]
            case "truncated":
                changed = content[:at]
            case "with a block of zeros":
                changed = content[:at] + bytes(end - at) + content[end:]
            case "with a block of noise":
                changed = content[:at] + noise.randbytes(end - at) + content[end:]
            case "with a byte inserted":
                changed = content[:at] + noise.randbytes(1) + content[at:]
            case "replaced by noise":
                changed = noise.randbytes(at)
            case "lengthened":
                changed = content + noise.randbytes(at)
            case "doubled":
                changed = content * 2
            case "swapped":
                return {self.file: good[self.other], self.other: content}
            case "deleted":
                return {self.file: None}
            case _:
                raise ValueError(self.kind)
        return {self.file: changed}


def _damages(name: str, good: dict[str, bytes]) -> Iterator[Damage]:
    for file, content in good.items():
        step = 1 + len(content) // FORMATS[name].places
        for at in range(0, len(content), step):
            yield Damage(name, "with a flipped bit", file, at)
            yield Damage(name, "truncated", file, at)
        for at in range(0, len(content), max(_BLOCK_BYTES // 4, 4 * step)):
            yield Damage(name, "with a block of zeros", file, at)
            yield Damage(name, "with a block of noise", file, at)
            yield Damage(name, "with a byte inserted", file, at)
        for length in (1, 10, 100, 10_000, len(content)):
            yield Damage(name, "replaced by noise", file, length)
        for length in (1, 40, 4096):
            yield Damage(name, "lengthened", file, length)
        yield Damage(name, "doubled", file)
        yield Damage(name, "deleted", file)
    for file, other in itertools.combinations(good, 2):
        yield Damage(name, "swapped", file, other=other)


def run(campaign: Campaign) -> None:
    warnings.simplefilter("ignore")
    os.environ["HF_HUB_OFFLINE"] = "1"
    damages: list[Damage] = []
    for name in chosen(campaign):
        by_kind: dict[str, list[Damage]] = {}
        for damage in _damages(name, contents(save_format(campaign.folder, name))):
            by_kind.setdefault(damage.kind, []).append(damage)
        for some in by_kind.values():
            damages += campaign.pick(some)
    prepare = functools.partial(_Checkpoints, campaign.folder)
    check_in_children(campaign, damages, lambda damage: f"files {damage.kind}", prepare, _check)


class _Checkpoints:
    """The checkpoints of one child, and what each holds."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root = root
        self.folder = folder

    @functools.cache  # noqa: B019 - lives as long as its child
    def copy(self, name: str) -> tuple[Path, dict[str, bytes], State]:
        folder = self.folder / name
        shutil.copytree(self.root / name, folder)
        return folder, contents(folder), FORMATS[name].load(folder)


def _check(checkpoints: _Checkpoints, damage: Damage) -> None:
    folder, good, expected = checkpoints.copy(damage.format)
    changed = damage.applied(good)
    for file, content in changed.items():
        if content is None:
            (folder / file).unlink()
        else:
            (folder / file).write_bytes(content)
    try:
        _loads_or_refuses(damage, folder, changed, expected)
    finally:
        for path in folder.rglob("*"):
            if path.is_file() and path.relative_to(folder).as_posix() not in good:
                path.unlink()
        for file, content in good.items():
            path = folder / file
            if not path.is_file() or path.read_bytes() != content:
                path.write_bytes(content)


def _loads_or_refuses(damage: Damage, folder: Path, changed: dict[str, bytes | None], expected: State) -> None:
    unchecked = FORMATS[damage.format].unchecked
    covered = [file for file in changed if not any(fnmatch.fnmatch(file, pattern) for pattern in unchecked)]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        loaded, error = None, None
        try:
            loaded = FORMATS[damage.format].load(folder)
        except CheckpointError as exc:
            error = exc
    if error is None and covered:
        assert_same(loaded, expected)
    elif error is not None:
        causes = own_causes(error)
        # The manager says in warnings what each checkpoint lacks. Where no checksum covers a file, the error may name
        # another file that contradicts it.
        said = "".join([str(error), *(str(one.message) for one in warned)])
        named = any((Path(file).name if ".metadata" not in file else "metadata") in said for file in changed)
        if damage.kind == "deleted" and not named:
            # Without this file there may be no checkpoint; or the error counts and names the files that are left.
            named = any(isinstance(cause, CheckpointNotFoundError) for cause in causes)
            named = named or any(Path(file).name in said for file in contents(folder))
        assert named or not covered, f"the error names none of {list(changed)}: {said}"


def own_causes(error: CheckpointError) -> list[BaseException]:
    """Return what an error says that the ranks have raised, having checked that they are errors of the package's."""
    if not isinstance(error, dcp.CheckpointException):
        return [error]
    causes = [cause for cause, _ in error.failures.values()]
    for cause in causes:
        assert isinstance(cause, (CheckpointError, OSError)), f"an error that is not the package's: {cause!r}"
    return causes
