"""The contents of a Lightning checkpoint directory, and the search for the newest committed one.

A directory that `DCPCheckpointIO` writes is a sharded checkpoint as Lightning's own strategies write it::

    .metadata      DCP's index; the checkpoint exists from the instant this file does
    *.distcp       tensors: "state_dict" (the model), "optimizer_0", "optimizer_1", ...
    meta.pt        everything else (loops, callbacks, schedulers, hyper-parameters), as one ``torch.save`` file

with one addition: what is in ``meta.pt`` is also an item of the DCP data, under ``lightning_meta``. Two files cannot
be replaced in one step, so a pair of them can be torn by a kill; the item is committed by the same rename as the
tensors it belongs to. We load the item and ignore ``meta.pt`` wherever the item exists; ``meta.pt`` is for stock
Lightning, which sees no checkpoint (rather than a mixed one) in the instants when the pair would not match. The item
also has the versions of the modules, which ``state_dict()`` carries in an attribute.

``FSDPStrategy`` calls the model "model" where ``ModelParallelStrategy`` calls it "state_dict"; both are read. Under
Fabric, modules and optimizers have the names that the user has given them, here as in stock.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch.distributed.tensor import DTensor

import dcp_plugins as dcp
from dcp_plugins.contract import BytesStorageMetadata, Metadata
from dcp_plugins.errors import CorruptCheckpointError, PlanError, UnsafeCheckpointError, UnsupportedValueError, listing
from dcp_plugins.format.saved_mappings import saved_mappings_of
from dcp_plugins.format.trust import SafeGlobal
from dcp_plugins.lightning.paths import local_path
from dcp_plugins.manager import is_committed, remove_if_uncommitted
from dcp_plugins.plan.unloadable import warn_of_unloadable
from dcp_plugins.plan.values import dump_value, load_value
from dcp_plugins.storage.companion import replaced_name
from dcp_plugins.storage.regular import read_regular
from dcp_plugins.torch_private import ShardedTensor
from dcp_plugins.user_warnings import warn_user

__all__ = [
    "BARE",
    "META_FILE",
    "META_FILES",
    "META_KEY",
    "MODEL_KEYS",
    "PICKLE",
    "VERSIONS",
    "Contents",
    "ModelKey",
    "contents_of",
    "decode_meta",
    "encode_meta",
    "last_checkpoint",
    "meta_file",
    "meta_item",
    "optimizer_key",
    "parts_of",
    "read_meta_file",
    "remove_uncommitted",
    "saved_step",
]

META_FILE = "meta.pt"
META_FILES = (META_FILE, f"{META_FILE}.new", replaced_name(META_FILE))
"""The files that a save may leave beside those of DCP."""
META_KEY = "lightning_meta"
ModelKey = Literal["state_dict", "model"]
MODEL_KEYS: tuple[ModelKey, ...] = get_args(ModelKey)
BARE = "bare_state"
"""The name of the part that holds a plain dict, such as a module's state dict, instead of a Trainer's checkpoint."""

PICKLE = "pickle"
VERSIONS = "versions"
"""The key of the versions of modules in the item under `META_KEY`, see `module_versions.py`."""
_HOW_TO_TRUST = "weights_only=False (Trainer and Fabric: plugins=[DCPCheckpointIO(weights_only=False)])"
_STEP = "global_step"
# The Trainer's name for the number of steps, and what a user of Fabric may call it.
_NAMES_OF_STEP = (_STEP, "step")
_EPOCH = "epoch"


@dataclass(frozen=True, slots=True)
class Contents:
    """The contents of a checkpoint directory, from its ``.metadata``."""

    model_key: str
    """The name of the model's part: one of `MODEL_KEYS`, or `BARE`."""
    num_optimizers: int
    parts: dict[str, frozenset[str]]
    """The result of `parts_of`."""


def optimizer_key(index: int) -> str:
    """Name the part of the checkpoint that holds optimizer number ``index``."""
    return f"optimizer_{index}"


def parts_of(metadata: Metadata) -> dict[str, frozenset[str]]:
    """Return the names of a checkpoint's parts and the keys in each, from its metadata; include parts without keys."""
    parts: dict[str, set[str]] = {}
    planned = metadata.planner_data or {}
    for fqn in metadata.state_dict_metadata:
        where = planned.get(fqn)
        if where is None:
            where = fqn.split(".", 1)
        parts.setdefault(str(where[0]), set()).add(str(where[1]) if len(where) > 1 else "")
    for path in saved_mappings_of(metadata) or ():
        # The metadata of stock torch lists values. An empty mapping has none: only our record names the mapping.
        if path:
            parts.setdefault(str(path[0]), set()).update(map(str, path[1:2]))
    return {name: frozenset(keys) for name, keys in parts.items()}


def contents_of(metadata: Metadata, path: Path) -> Contents:
    """Return the contents of the checkpoint at ``path``, from its metadata.

    Raises:
        PlanError: There is no model in it: not a Lightning checkpoint.
    """
    parts = parts_of(metadata)
    model_key = next((key for key in (*MODEL_KEYS, BARE) if key in parts), None)
    if model_key is None:
        raise PlanError(
            f"Expected a Lightning checkpoint in {path}, with the model under one of {listing(MODEL_KEYS)}, but found"
            f" only: {listing(parts) or 'nothing'}. Use dcp_plugins.load for a checkpoint that Lightning did not write."
        )
    num_optimizers = 0
    while optimizer_key(num_optimizers) in parts:
        num_optimizers += 1
    return Contents(model_key, num_optimizers, parts)


def encode_meta(meta: dict[str, Any]) -> bytes:
    """Serialise the non-tensor part (all but model and optimizers), as ``meta.pt`` holds it.

    Raises:
        UnsupportedValueError: A sharded tensor is in it. Pickled, it would be this rank's shard only.
    """
    sharded = list(_paths_of_sharded(meta, "checkpoint"))
    if sharded:
        raise UnsupportedValueError(
            "Expected sharded tensors only in the state dicts of modules and optimizers, but found some at:"
            f" {listing(sharded)}. A callback, a hook or an entry of the state put them there; let it add full tensors"
            " (DTensor.full_tensor(), or dcp_plugins.state_dict with StateDictOptions(full_state_dict=True)), or"
            " register them as buffers of the module."
        )
    warn_of_unloadable(meta, _HOW_TO_TRUST, are_pickled=True)
    return dump_value(meta).getvalue()


def _paths_of_sharded(value: object, path: str) -> Iterator[str]:
    # A parameter inside a unit of FSDP1 is an ordinary tensor by its class; FSDP1 marks it.
    if isinstance(value, (DTensor, ShardedTensor)) or (torch.is_tensor(value) and hasattr(value, "_fsdp_flattened")):
        yield path
    elif isinstance(value, Mapping):
        for key, member in value.items():
            yield from _paths_of_sharded(member, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, member in enumerate(value):
            yield from _paths_of_sharded(member, f"{path}[{index}]")


def decode_meta(
    data: bytes,
    *,
    weights_only: bool,
    path: Path,
    safe_globals: Iterable[SafeGlobal] = (),
    file: Path | None = None,
) -> dict[str, Any]:
    """Deserialise the result of `encode_meta`, with tensors on the CPU.

    Args:
        data: The bytes.
        weights_only: Decode plain data only.
        path: The checkpoint, for messages.
        safe_globals: Classes that are admitted besides.
        file: The file that the bytes are from, if they are not from DCP's data, whose reader has checked them.
    """
    try:
        meta: Any = load_value(
            META_KEY if file is None else str(file),
            io.BytesIO(data),
            weights_only=weights_only,
            safe_globals=safe_globals,
            map_location="cpu",
            how_to_trust=_HOW_TO_TRUST,
            verify_checksums=file is not None,
        )
    except UnsafeCheckpointError as exc:
        raise UnsupportedValueError(
            f"The non-tensor part of {path} (hyper-parameters, callbacks, loops) holds objects that are not plain data:"
            f" {exc}"
        ) from exc
    if not isinstance(meta, dict):
        raise CorruptCheckpointError(
            f"{path if file is None else file}: the non-tensor part is a {type(meta).__name__}, expected a dict"
        )
    return meta


def meta_file(path: Path) -> Path:
    """Return the file with the non-tensor part of a checkpoint that stock Lightning wrote.

    A save that was to replace such a checkpoint has renamed the file, and may never have been committed.
    """
    aside = path / replaced_name(META_FILE)
    return aside if aside.is_file() and not (path / META_FILE).is_file() else path / META_FILE


def read_meta_file(path: Path, *, weights_only: bool, safe_globals: Iterable[SafeGlobal] = ()) -> dict[str, Any]:
    """Return the non-tensor part of a checkpoint from that file."""
    file = meta_file(path)
    try:
        data = read_regular(path, file.name)
    except FileNotFoundError as exc:
        raise CorruptCheckpointError(
            f"{file} is missing: expected the non-tensor part of the checkpoint in it. Copy the checkpoint again, whole"
        ) from exc
    return decode_meta(data, weights_only=weights_only, path=path, safe_globals=safe_globals, file=file)


def meta_item(meta: dict[str, Any], encoded: bytes) -> dict[str, Any]:
    """Make the part of the DCP state dict that holds the non-tensor part."""
    item: dict[str, Any] = {PICKLE: encoded}
    step, epoch = _step_of(meta), meta.get(_EPOCH)
    if step is not None:
        item[_STEP] = step
    if isinstance(epoch, int):
        item[_EPOCH] = epoch
    return item


def _step_of(meta: Mapping[str, Any]) -> int | None:
    return next((int(meta[name]) for name in _NAMES_OF_STEP if isinstance(meta.get(name), int)), None)


def saved_step(path: str | os.PathLike[str]) -> int:
    """Read the step at which the committed checkpoint at ``path`` was saved.

    Raises:
        PlanError: It does not say.
    """
    path = local_path(path)
    reader = dcp.FileSystemReader(path)
    name = f"{META_KEY}.{_STEP}"
    if isinstance(reader.read_metadata().state_dict_metadata.get(name), BytesStorageMetadata):
        return int(dcp.load_from_keys(name, storage_reader=reader)[META_KEY][_STEP])
    step = _step_of(read_meta_file(path, weights_only=True))
    if step is None:
        raise PlanError(
            f"The checkpoint {path} does not say at which step it was saved. With Fabric, save the number of steps"
            f" as an entry with one of the names {listing(_NAMES_OF_STEP)}."
        )
    return step


def last_checkpoint(dirpath: str | os.PathLike[str]) -> Path | None:
    """Find the newest committed checkpoint in a directory of checkpoints, or ``None``.

    Newest is the highest step that a checkpoint says it was saved at (the Trainer's ``global_step``, or the entry
    "global_step" or "step" of what Fabric saved); file times are never asked. A directory that a
    killed save left without a commit does not count, one that cannot be read is skipped with a warning. Among several
    of one step (``last.ckpt`` beside ``step=100.ckpt``) the first by name is taken; links count as what they point to.
    """
    root = local_path(dirpath)
    best: tuple[int, Path] | None = None
    for candidate in sorted(root.iterdir()) if root.is_dir() else ():
        if candidate.is_symlink():
            candidate = candidate.resolve()
        if not is_committed(candidate):
            continue
        try:
            step = saved_step(candidate)
        except Exception as exc:  # a damaged checkpoint must not hide the good ones
            warn_user(f"Skipped the checkpoint {candidate}: {type(exc).__name__}: {exc}")
            continue
        if best is None or step > best[0]:
            best = (step, candidate)
    return None if best is None else best[1]


def remove_uncommitted(dirpath: str | os.PathLike[str]) -> list[Path]:
    """Delete what killed saves left in a directory of checkpoints, and return what was deleted.

    Only directories without a commit that hold nothing but checkpoint data files are deleted. Call it while nothing is
    being saved there: a save in progress looks the same as one that was killed.
    """
    root = local_path(dirpath)
    entries = sorted(root.iterdir()) if root.is_dir() else ()
    return [path for path in entries if remove_if_uncommitted(path, META_FILES)]
