"""One checkpoint whose parts lie in directories of their own, each of which can be read as a checkpoint by itself.

checkpoint/.metadata              the commit: it names files of all parts, and without it none of them counts
checkpoint/<part>/*.distcp        the data of one top-level key of the state dict
checkpoint/<part>/.metadata       written afterwards, for programs that open the part alone
checkpoint/*.distcp               what belongs to no part
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dcp_plugins.contract import Metadata, MetadataIndex, StorageInfo, WriteItem, WriteResult
from dcp_plugins.errors import CheckpointError, CorruptCheckpointError, StorageWriteError, listing
from dcp_plugins.format.data_mark import MARKED, has_marked_files
from dcp_plugins.format.metadata import decode_extras, decode_with_extras, encode
from dcp_plugins.format.names import METADATA_NAME, temporary_name
from dcp_plugins.format.saved_mappings import attach, encoded_of
from dcp_plugins.storage.local import make_directory, publish, sync_directory
from dcp_plugins.storage.regular import read_regular
from dcp_plugins.storage.writer import FileSystemWriter

__all__ = ["PartsWriter", "is_foreign", "is_view", "publish_view"]

_VIEW_OF = "view_of"


class PartsWriter(FileSystemWriter):
    """Write a checkpoint in which some top-level keys of the state dict have directories of their own.

    One commit stands for all of them, and at every instant one whole checkpoint is there, as with its base class.

    Args:
        path: The checkpoint's directory.
        parts: The keys; each is also the name of its directory.
        sync_files: As in ``FileSystemWriter``.
        thread_count: As in ``FileSystemWriter``.
    """

    warns_of_replacing = False

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        parts: Iterable[str],
        sync_files: bool = True,
        thread_count: int | None = None,
    ) -> None:
        super().__init__(path, sync_files=sync_files, thread_count=thread_count)
        self.parts = tuple(parts)
        self.all_folders = ("", *self.parts)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        # A load refuses what lies behind such a link. What is deleted there could be somebody else's.
        links = [part for part in self.parts if (self.path / part).is_symlink()]
        if links:
            raise StorageWriteError(
                f"{self.path}: expected folders for the parts of the checkpoint, found symbolic links: {listing(links)}"
                ". Remove the links, or save to another directory"
            )
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)

    def folders(self, items: list[WriteItem]) -> Iterable[tuple[str, list[WriteItem]]]:
        groups: dict[str, list[WriteItem]] = {}
        for item in items:
            groups.setdefault(_part_of(item.index.fqn, self.parts), []).append(item)
        for part in sorted(groups):
            if part:
                make_directory(self.path / part, sync=self.sync_files)
        # Files are numbered through all of them: names differ even where parts are copied into one directory.
        return sorted(groups.items())

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        if self.sync_files:
            # Publishing syncs the directory of the metadata alone.
            for part in self.parts:
                if (self.path / part).is_dir():
                    sync_directory(self.path / part)
        super().finish(metadata, results)


def publish_view(path: Path, part: str, *, sync_files: bool = False) -> None:
    """Let a part of the committed checkpoint at ``path`` be opened alone: write the ``.metadata`` in its directory.

    In it the part's own name is missing from all keys. It follows the commit and may be written anew at any time.
    """
    source = path / METADATA_NAME
    decoded = decode_with_extras(read_regular(path, METADATA_NAME), str(source))
    save_id = decoded.extras.get("save_id")
    if not isinstance(save_id, str):
        raise CorruptCheckpointError(f"{source} names no save: expected a checkpoint that PartsWriter wrote")
    view = _view(decoded.metadata, part)
    names = sorted({info.relative_path for info in view.storage_data.values()})
    content = encode(
        view,
        extras={
            _VIEW_OF: save_id,
            "save_id": save_id,
            MARKED: has_marked_files(decoded.metadata),
            "files": {name: (path / part / name).stat().st_size for name in names},
        },
    )
    folder = path / part
    publish(folder / METADATA_NAME, content, folder / temporary_name(METADATA_NAME, save_id), sync=sync_files)


def is_view(part: Path) -> bool:
    """Tell whether the ``.metadata`` in a directory only follows that of the directory above it."""
    source = part / METADATA_NAME
    try:
        return _VIEW_OF in decode_extras(read_regular(part, METADATA_NAME), str(source))
    except CorruptCheckpointError:
        return True  # what is damaged is a trailer, which only we write


def is_foreign(part: Path) -> bool:
    """Tell whether the ``.metadata`` in a part's directory is a checkpoint's of its own, whole, and no view."""
    source = part / METADATA_NAME
    try:
        return _VIEW_OF not in decode_with_extras(read_regular(part, METADATA_NAME), str(source)).extras
    except CheckpointError:
        return False


def _part_of(fqn: str, parts: tuple[str, ...]) -> str:
    return next((part for part in parts if fqn.startswith(f"{part}.")), "")


def _view(metadata: Metadata, part: str) -> Metadata:
    """Return the metadata of one part, with keys and file names as they are seen from inside it."""
    prefix, folder = f"{part}.", f"{part}/"
    planned: dict[str, Any] = metadata.planner_data or {}
    storage: dict[MetadataIndex, StorageInfo] = {}
    for index, info in metadata.storage_data.items():
        if index.fqn.startswith(prefix):
            inside = copy.copy(info)
            inside.relative_path = info.relative_path.removeprefix(folder)
            storage[MetadataIndex(index.fqn.removeprefix(prefix), index.offset, index.index)] = inside
    record = encoded_of(metadata)
    view = Metadata(
        state_dict_metadata={
            fqn.removeprefix(prefix): entry
            for fqn, entry in metadata.state_dict_metadata.items()
            if fqn.startswith(prefix)
        },
        planner_data={fqn.removeprefix(prefix): path[1:] for fqn, path in planned.items() if fqn.startswith(prefix)},
        storage_data=storage,
        storage_meta=copy.copy(metadata.storage_meta),
        version=metadata.version,
    )
    if record is not None:
        attach(view, [[at[1:], *rest] for at, *rest in record if at[:1] == [part]])
    return view
