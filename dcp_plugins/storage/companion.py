"""A checkpoint with one small file beside it that belongs to the same save: what a framework keeps next to DCP's files.

It is here, and not in an adapter, because a save in a process of its own sends the writer there: that process is not to
import a framework.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from typing import Any, ClassVar

from dcp_plugins.contract import Metadata, WriteResult
from dcp_plugins.storage.local import naming, sync_directory, write_new
from dcp_plugins.storage.writer import FileSystemWriter

__all__ = ["CompanionWriter", "replaced_name"]

logger = logging.getLogger(__name__)


def replaced_name(name: str) -> str:
    """Name the file that holds the previous companion ``name`` while a save is being committed."""
    return f"{name}.replaced"


class CompanionWriter(FileSystemWriter):
    """Publishes a companion file around the commit of a checkpoint, inside the engine's own error handling.

    Args:
        path: The checkpoint's directory.
        name: The companion's name in it.
        content: What the coordinator publishes; other ranks give ``b""``. An exception is what a rank failed with
            before the save could begin: every rank raises it.
        sync_files: As in `FileSystemWriter`.
        thread_count: As in `FileSystemWriter`.
    """

    warns_of_replacing: ClassVar[bool] = False  # a trainer saves ``last.ckpt`` again on purpose

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        name: str,
        content: bytes | Exception,
        sync_files: bool = True,
        thread_count: int | None = None,
    ) -> None:
        super().__init__(path, sync_files=sync_files, thread_count=thread_count)
        self._name = name
        self._content = content

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        # Raised here because all ranks hear of errors in this step. They hear of errors in the planning steps, too, but
        # the engine does not reuse earlier plans if a writer overrides one of those.
        if isinstance(self._content, Exception):
            raise self._content
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        # In this order, the companion of one save never stands beside the .metadata of another. The previous companion
        # is put aside until the commit: a reader finds it there.
        final, replaced = self.path / self._name, self.path / replaced_name(self._name)
        # A fixed name: what a kill leaves is replaced by the next save, and the commit does not reclaim it.
        fresh = self.path / f"{self._name}.new"
        is_aside = False
        try:
            assert isinstance(self._content, bytes), "an exception was raised in the first exchange"
            with naming(fresh):
                write_new(fresh, self._content, sync=self.sync_files)
            if final.exists():
                final.replace(replaced)
                is_aside = True
            if self.sync_files:
                sync_directory(self.path)
            super().finish(metadata, results)
        except BaseException:
            # Nothing is committed: the companion of the checkpoint that stays goes back to its place.
            with suppress(OSError):
                if is_aside:
                    replaced.replace(final)
            with suppress(OSError):
                fresh.unlink(missing_ok=True)
            raise
        try:
            fresh.replace(final)
            replaced.unlink(missing_ok=True)
            if self.sync_files:
                sync_directory(self.path)
        except OSError:
            logger.warning(
                "%s is complete except for %s, which the next save writes anew", self.path, final, exc_info=True
            )
