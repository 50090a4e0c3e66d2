"""Whole tensors from the shards that ranks have written into safetensors files."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from dcp_plugins.errors import CorruptCheckpointError
from dcp_plugins.format.names import temporary_name
from dcp_plugins.format.safetensors_header import Header, attributes_for, file_name, placements
from dcp_plugins.geometry import Box, covers
from dcp_plugins.storage.arrays import ScratchPool, read_box
from dcp_plugins.storage.local import make_directory, remove_files, sync_directory
from dcp_plugins.storage.regular import open_regular
from dcp_plugins.storage.safetensors_file import NewFile, NewTensor, Piece, assembled, read_header, write_files

__all__ = ["consolidate"]


@dataclass
class _Whole:
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: list[Piece] = field(default_factory=list)


def consolidate(
    source: Path,
    names: Collection[str],
    output: Path,
    index_by_fqn: dict[str, int] | None,
    *,
    save_id: str,
    thread_count: int,
    sync: bool,
) -> dict[tuple[str, str], int]:
    """Make whole tensors of shards; memory is bounded, whatever the tensors' size.

    Shards are read a few seconds after they were written, and in blocks: only those that one block holds whole are
    compared with their checksums.

    Args:
        source: Directory of the shards.
        names: The shards' files; all of one save.
        output: Directory for the whole tensors.
        index_by_fqn: File number of each fqn; None for one file.
        save_id: Of the save; marks the files.
        thread_count: Threads that copy.
        sync: Sync the files, and the directory after the last rename.

    Returns:
        Bytes of each tensor, by fqn and file.

    Raises:
        CorruptCheckpointError: The shards do not make up a tensor.
    """
    wholes = _described(source, names)
    largest = max(index_by_fqn.values(), default=1) if index_by_fqn else 1
    members: dict[str, list[str]] = {}
    for fqn in wholes:
        members.setdefault(file_name(index_by_fqn[fqn] if index_by_fqn else 1, largest), []).append(fqn)
    make_directory(output, sync=sync)
    # No sharding information: a reader takes tensors without it for whole ones.
    attributes = attributes_for(None, save_id=save_id, num_files=len(members))
    temporaries = {name: temporary_name(name, save_id) for name in members}
    files = [
        NewFile(output / temporaries[name], [_tensor(fqn, wholes[fqn]) for fqn in fqns], attributes)
        for name, fqns in members.items()
    ]
    try:
        write_files(files, thread_count=thread_count, sync=sync)
    except BaseException:
        remove_files(output, temporaries.values())
        raise
    for name, temporary in temporaries.items():
        (output / temporary).replace(output / name)
    if sync:
        sync_directory(output)
    return {
        (tensor.name, name): tensor.nbytes for name, file in zip(members, files, strict=True) for tensor in file.tensors
    }


def _tensor(fqn: str, whole: _Whole) -> NewTensor:
    return NewTensor(fqn, whole.dtype, whole.shape, lambda: assembled(whole.shape, whole.dtype, whole.pieces))


def _described(source: Path, names: Collection[str]) -> dict[str, _Whole]:
    pool = ScratchPool()
    wholes: dict[str, _Whole] = {}
    for name in sorted(names):
        path = source / name
        header = read_header(path)
        for fqn, place in placements(header, str(path)).items():
            entry = header.tensors[fqn]
            if place.global_shape is None:
                raise CorruptCheckpointError(
                    f"{path}: {fqn} lacks its global shape: another writer has replaced the file"
                )
            whole = wholes.setdefault(fqn, _Whole(entry.dtype, place.global_shape))
            if (whole.dtype, whole.shape) != (entry.dtype, place.global_shape):
                raise CorruptCheckpointError(
                    f"{path}: {fqn} is {entry.dtype} of {place.global_shape}, "
                    f"in another file {whole.dtype} of {whole.shape}"
                )
            whole.pieces.append(Piece(Box(place.offsets, entry.shape), partial(_fill, path, fqn, header, pool)))
    for fqn, whole in wholes.items():
        holes = covers([piece.box for piece in whole.pieces], Box((0,) * len(whole.shape), whole.shape))
        if holes:
            raise CorruptCheckpointError(
                f"{source}: the shards of {fqn} do not make up the tensor: missing offsets {holes[0].offsets} sizes "
                f"{holes[0].sizes}"
            )
    return wholes


def _fill(path: Path, fqn: str, header: Header, pool: ScratchPool, target: torch.Tensor, box: Box) -> None:
    entry, checksum = header.tensors[fqn], header.checksums.get(fqn)
    # Opened for each block: a descriptor for every rank's file would be too many at once.
    fd, _ = open_regular(path.parent, path.name)
    try:
        read_box(
            fd,
            entry.start,
            entry.shape,
            entry.dtype,
            box.offsets,
            box.sizes,
            target,
            pool=pool,
            where=f"{path} ({fqn})",
            checksum=checksum,
        )
    finally:
        os.close(fd)
