"""The contents of a checkpoint directory, and the search for checkpoints.

::

    .metadata                       the commit: the checkpoint exists from the instant this file does
    pytorch_model_fsdp_0/*.distcp   the first model, under "pytorch_model_fsdp_0.model"
    optimizer_0/*.distcp            the first optimizer, under "optimizer_0.optimizer"
    __<rank>_<n>-<id>.distcp        everything else, under "accelerate": the bytes of the files that stock writes

After the commit comes what stock Accelerate and its tools look for, made from what is committed and never read back::

    pytorch_model_fsdp_0/.metadata, optimizer_0/.metadata
    scheduler.bin, random_states_<rank>.pkl, custom_checkpoint_<n>.pkl, ...
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accelerate.utils.constants import FSDP_MODEL_NAME, MODEL_NAME, OPTIMIZER_NAME, RNG_STATE_NAME, SAFE_MODEL_NAME

import dcp_plugins as dcp
from dcp_plugins.contract import Metadata
from dcp_plugins.errors import CheckpointError, CheckpointNotFoundError, PlanError, UnsafeCheckpointError, listing
from dcp_plugins.format.names import METADATA_NAME, save_id_of
from dcp_plugins.manager import StepNames, is_committed, verify_checkpoint
from dcp_plugins.manager.failed_saves import failure_of
from dcp_plugins.storage.local import publish, remove_files
from dcp_plugins.storage.parts import is_foreign, is_view, publish_view
from dcp_plugins.user_warnings import warn_user

__all__ = [
    "AUTOMATIC_NAMES",
    "REST",
    "Contents",
    "automatic_number",
    "automatically_named",
    "check_file_name",
    "contents_of",
    "is_litter",
    "is_random_state",
    "kind_of",
    "model_part",
    "newest_checkpoint",
    "newest_of",
    "numbered",
    "optimizer_part",
    "refuse_unless_checkpoint",
    "write_stock_files",
]

log = logging.getLogger(__name__)

REST = "accelerate"
"""The key of what is neither model nor optimizer: by rank, by file name, the bytes of the file."""

_PART = re.compile(rf"({FSDP_MODEL_NAME}|{OPTIMIZER_NAME})_([0-9]+)")
# Wider than what is known, for files that a later Accelerate may add.
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*\.(bin|pt|pkl)")
_FILE = re.compile(
    r"(scheduler|sampler|dl_state_dict)(_[0-9]+)?\.bin|scaler\.pt|random_states_[0-9]+\.pkl|custom_checkpoint_[0-9]+\.pkl"
)
_REPLACED = re.compile(rf"({OPTIMIZER_NAME}|{FSDP_MODEL_NAME})(_[0-9]+)?\.bin")
"""Files of a stock checkpoint that ours has replaced. A user's hook may have written its model.safetensors."""
AUTOMATIC_NAMES = StepNames(prefix="checkpoint_")
_LAST_OF_STOCK = f"{RNG_STATE_NAME}_0.pkl"
_NEVER_COMMITTED = "never committed"
_NUMBER = re.compile(r"([0-9]+)(?=[^0-9/]*$)")


def model_part(index: int) -> str:
    """Name the directory of a model, as stock Accelerate names it under FSDP."""
    return f"{FSDP_MODEL_NAME}_{index}"


def optimizer_part(index: int) -> str:
    """Name the directory of an optimizer, as stock Accelerate names it under FSDP."""
    return f"{OPTIMIZER_NAME}_{index}"


@dataclass(frozen=True, slots=True)
class Contents:
    """The contents of a committed checkpoint of ours, from its metadata."""

    model_names: Mapping[int, frozenset[str]]
    """The names of the parameters and buffers of each saved model, by its number."""
    optimizers: frozenset[int]
    files: Mapping[int, frozenset[str]]
    """The names of the small files of each rank that saved, which stock Accelerate would have written, by rank."""

    def files_for(self, rank: int, num_processes: int) -> dict[str, int]:
        """Say which files this process restores from, and of which rank.

        Rank 0's are everybody's, as in stock Accelerate. Its own go before them on as many processes as saved; on
        another number, that is only the random state of its number, if there is one.
        """
        chosen = dict.fromkeys(self.files[0], 0)
        for name in self.files.get(rank, ()):
            if num_processes == len(self.files) or is_random_state(name):
                chosen[name] = rank
        return chosen


def contents_of(metadata: Metadata, path: Path) -> Contents:
    """Read off the metadata what is in a checkpoint.

    Raises:
        PlanError: It is a checkpoint, but not one that ``save_state`` wrote.
    """
    models: dict[int, set[str]] = {}
    optimizers: set[int] = set()
    files: dict[int, set[str]] = {}
    for keys in (metadata.planner_data or {}).values():
        part = _PART.fullmatch(str(keys[0]))
        if part is not None and part[1] == FSDP_MODEL_NAME:
            models.setdefault(int(part[2]), set()).add(str(keys[2]))
        elif part is not None:
            optimizers.add(int(part[2]))
        elif keys[0] == REST:
            files.setdefault(int(keys[1]), set()).add(check_file_name(str(keys[2])))
    if 0 not in files:
        raise PlanError(
            f"Expected a checkpoint of Accelerate in {path}, found one without the key '{REST}.0'. Use dcp_plugins.load"
            " for a checkpoint that save_state did not write."
        )
    return Contents(
        {index: frozenset(names) for index, names in models.items()},
        frozenset(optimizers),
        {rank: frozenset(names) for rank, names in files.items()},
    )


def check_file_name(name: str) -> str:
    """Return a name if it can be one that stock Accelerate gives to a file beside models and optimizers.

    Raises:
        UnsafeCheckpointError: It is not. Names come from the checkpoint, and files are written by them.
    """
    if _FILE_NAME.fullmatch(name) is None:
        raise UnsafeCheckpointError(
            f"expected the name of a file that Accelerate writes (scheduler.bin, scaler.pt, ...), found {name!r}"
        )
    return name


def is_random_state(name: str) -> bool:
    """Tell whether a file holds the state of a rank's random numbers."""
    return name.startswith(RNG_STATE_NAME)


def kind_of(path: Path) -> Literal["ours", "stock"] | None:
    """Tell what wrote the checkpoint at ``path``; None if it is not one, or the save into it never finished."""
    if is_committed(path):
        return "ours"
    if any(is_view(part) for part in _published_parts(path)):
        return None  # what is left of a checkpoint of ours that was being deleted
    # Stock writes it when models, optimizers, and the files of the user's hooks, which run in our saves too, are there.
    return "stock" if (path / _LAST_OF_STOCK).is_file() else None


def _verify(path: Path, kind: Literal["ours", "stock"]) -> None:
    """Check that a checkpoint is whole, as far as can be told without reading its data, and one program's alone.

    Raises:
        CorruptCheckpointError: Data files are missing or have other sizes, or metadata cannot be read.
        PlanError: Stock Accelerate has saved into a checkpoint of ours.
    """
    if kind == "ours":
        verify_checkpoint(path)
        _refuse_if_stock_saved_over(path)
    else:
        for part in _published_parts(path):
            verify_checkpoint(part)


def _refuse_if_stock_saved_over(path: Path) -> None:
    """Refuse a committed checkpoint of ours with stock's files in it, which we remove when ours has replaced them.

    Raises:
        PlanError: There are some; says how either one is loaded.
    """
    found = [name for name in os.listdir(path) if _REPLACED.fullmatch(name) is not None]
    # Where stock saved more models, what it left in a directory that we have none for is nobody's.
    parts = [part for part in _published_parts(path) if _data_of_ours(part)]
    found += [f"{part.name}/{METADATA_NAME}" for part in parts if is_foreign(part)]
    if found:
        raise PlanError(
            f"{path} holds two checkpoints: ours, and, in {listing(found)}, one of stock Accelerate, which has saved"
            " there since, unless our save was killed right after it had replaced stock's. To load stock's, call"
            " disable(accelerator) first. To load ours, let dcp_plugins.accelerate.write_stock_files delete stock's."
        )


def newest_of(candidates: Iterable[Path]) -> tuple[tuple[Path, Literal["ours", "stock"]] | None, dict[Path, str]]:
    """Return the first candidate that is a whole checkpoint, with its kind, and why those before it are not."""
    skipped: dict[Path, str] = {}
    for path in candidates:
        try:
            kind = kind_of(path)
            if kind is not None:
                _verify(path, kind)
                return (path, kind), skipped
        except (CheckpointError, OSError) as exc:
            skipped[path] = str(exc)
        else:
            skipped[path] = failure_of(path) or _NEVER_COMMITTED
    return None, skipped


def _published_parts(path: Path) -> list[Path]:
    """Return the directories of models and optimizers that have metadata of their own."""
    names = os.listdir(path) if path.is_dir() else ()
    return [path / name for name in sorted(names) if _PART.fullmatch(name) is not None and is_committed(path / name)]


def _data_of_ours(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if save_id_of(name) is not None]


def _is_picked_by_hand(path: Path) -> bool:
    """Tell whether somebody has kept stock's weights without the rest; our killed saves' hooks may leave such files."""
    parts = [path / model_part(0), path / optimizer_part(0)]
    if any(_data_of_ours(folder) for folder in (path, *parts) if folder.is_dir()):
        return False
    files = (f"{SAFE_MODEL_NAME}.safetensors", f"{MODEL_NAME}.bin", f"{FSDP_MODEL_NAME}.bin")
    return any(is_committed(part) for part in parts) or any((path / name).is_file() for name in files)


def automatic_number(name: str) -> int | None:
    """Return the number in a name that automatic naming gives; None if it is another name."""
    return AUTOMATIC_NAMES.step_of(name)


def _number_of(name: str) -> int | None:
    """Return the number at the end of a checkpoint's name (``checkpoint_12``, ``step_100``, ``epoch_3``)."""
    found = _NUMBER.search(name)
    return int(found[1]) if found is not None else None


def newest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """Find the checkpoint with the highest number in its name, ours if committed or stock's; None if there is none.

    Warns of damaged checkpoints with a higher number. Says nothing of saves that never finished.
    """
    newest, skipped = newest_of(numbered(Path(folder)))
    damaged = [f"{path.name} ({reason})" for path, reason in skipped.items() if kind_of(path) is not None]
    if damaged:
        warn_user(f"Skipped in {os.fspath(folder)}, which are no good checkpoints: {listing(damaged)}")
    return newest[0] if newest is not None else None


def automatically_named(folder: Path) -> list[Path]:
    """Return the directories that are called as automatic naming calls checkpoints, the highest number first."""
    return [path for path in numbered(folder) if automatic_number(path.name) is not None]


def numbered(folder: Path) -> list[Path]:
    """Return the directories with a number at the end of their names, checkpoints or not, the highest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    named = (
        path
        for path in found
        if path.is_dir() and _number_of(path.name) is not None and _PART.fullmatch(path.name) is None
    )
    return sorted(named, key=_place, reverse=True)


def _place(path: Path) -> tuple[int, str]:
    number = _number_of(path.name)
    assert number is not None
    return number, path.name


def refuse_unless_checkpoint(path: Path) -> Literal["ours", "stock"]:
    """Return the kind of checkpoint at ``path``.

    Raises:
        CheckpointNotFoundError: It is none; names the newest one beside it.
        PlanError: Stock Accelerate has saved into one of ours.
    """
    kind = kind_of(path)
    if kind is None and _is_picked_by_hand(path):
        kind = "stock"
    if kind == "ours":
        _refuse_if_stock_saved_over(path)
    if kind is not None:
        return kind
    beside, _ = newest_of(numbered(path.parent))
    hint = (
        f"The newest committed checkpoint beside it is {beside[0]}." if beside else "There is no checkpoint beside it."
    )
    cause = failure_of(path) or "the save into it never finished, or another program wrote it"
    raise CheckpointNotFoundError(
        f"Expected a committed checkpoint in {path}, but it has no {METADATA_NAME}: {cause}. {hint}"
    )


def is_litter(path: Path) -> bool:
    """Tell whether a directory holds nothing but data of a save that was killed before its commit."""
    for entry in path.iterdir():
        is_part = entry.is_dir() and not entry.is_symlink() and _PART.fullmatch(entry.name) is not None
        for file in entry.iterdir() if is_part else [entry]:
            if not file.is_file() or save_id_of(file.name) is None:
                return False
    return True


def write_stock_files(path: str | os.PathLike[str]) -> None:
    """Write into a committed checkpoint what stock Accelerate and ``accelerate merge-weights`` look for.

    Every ``save_state`` does so, after its commit. Call it to make up for one that was killed in between. Runs on one
    process.
    """
    path = Path(path)
    contents = contents_of(dcp.FileSystemReader(path).read_metadata(), path)
    rest: dict[str, Any] = dcp.load_from_keys(REST, checkpoint_id=path)[REST]
    # Stock reads the models first. Without theirs, it cannot take files of two saves for one checkpoint.
    models = [model_part(index) for index in sorted(contents.model_names)]
    for part in models:
        (path / part / METADATA_NAME).unlink(missing_ok=True)
    files: dict[str, bytes] = {}
    for rank, own in rest.items():
        files.update((name, data) for name, data in own.items() if rank == "0" or is_random_state(name))
    parts = [*(optimizer_part(index) for index in sorted(contents.optimizers)), *models]
    for name in os.listdir(path):
        if (_FILE.fullmatch(name) is not None and name not in files) or _REPLACED.fullmatch(name) is not None:
            (path / name).unlink()
        elif _PART.fullmatch(name) is not None and name not in parts:
            _remove_part(path / name)
    for name, data in files.items():
        publish(path / check_file_name(name), data, path / f"{name}.new", sync=False)
    for part in parts:
        publish_view(path, part)


def _remove_part(folder: Path) -> None:
    """Delete what an earlier save, of more models or optimizers, left in the directory of one; nobody else's files."""
    if is_committed(folder) and is_view(folder):
        (folder / METADATA_NAME).unlink()
    remove_files(folder, _data_of_ours(folder))
    if not any(folder.iterdir()):
        folder.rmdir()
