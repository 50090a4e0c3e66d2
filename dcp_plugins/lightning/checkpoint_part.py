"""One part of a checkpoint directory (the model's, or an optimizer's), read by one process, key by key."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import dcp_plugins as dcp
from dcp_plugins.contract import Metadata, MetadataIndex
from dcp_plugins.errors import CheckpointException
from dcp_plugins.format.mapping_keys import text_of
from dcp_plugins.format.saved_mappings import attach, encoded_of, saved_mappings_of
from dcp_plugins.format.trust import SafeGlobal
from dcp_plugins.plan import EmptyStateDictLoadPlanner
from dcp_plugins.plan.flatten import KeyPath, paths_of

__all__ = ["CheckpointPart", "Reader"]


class Reader(dcp.FileSystemReader):
    """A reader that reads the metadata once, though this package and the engine both ask for the metadata."""

    _whole: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if args or kwargs:  # the metadata of one rank, from a save without collectives
            return super().read_metadata(*args, **kwargs)
        if self._whole is None:
            self._whole = super().read_metadata()
        return self._whole

    def limited_to(self, metadata: Metadata) -> Reader:
        """Return a reader of the same directory whose metadata names only some of the values."""
        made = Reader(self.path)
        made._whole = metadata
        return made


class CheckpointPart:
    """A root key of a checkpoint, and the keys below it.

    Args:
        reader: Reads the checkpoint.
        name: The root key.
        weights_only: Decode values that are no tensors as plain data.
        safe_globals: Classes that such values may also have.
        versions: The saved versions of a model's modules, see `module_versions.py`; None for an optimizer.
    """

    def __init__(
        self,
        reader: Reader,
        name: str,
        *,
        weights_only: bool = True,
        safe_globals: Iterable[SafeGlobal] = (),
        versions: str | None = None,
    ) -> None:
        self.reader = reader
        self.name = name
        self.versions = versions
        self.weights_only = weights_only
        self.safe_globals = tuple(safe_globals)
        # The names of the values below each key. A read makes metadata of these values alone: a walk over the whole
        # metadata for each of thousands of keys would take minutes.
        self._fqns: dict[str, list[str]] = {}
        metadata = reader.read_metadata()
        self._paths: dict[str, KeyPath] = {}
        for fqn, path in paths_of(metadata).items():
            if str(path[0]) == name and len(path) > 1:
                self._fqns.setdefault(str(path[1]), []).append(fqn)
                self._paths[fqn] = path
        for mapping in saved_mappings_of(metadata) or ():
            if len(mapping) > 1 and mapping[0] == name:
                self._fqns.setdefault(str(mapping[1]), [])
        self._stored: dict[str, list[tuple[MetadataIndex, Any]]] | None = None

    @property
    def keys(self) -> AbstractSet[str]:
        """The keys below the root key, in the order in which they were saved."""
        return self._fqns.keys()

    @property
    def path(self) -> Path:
        """The checkpoint's directory."""
        return self.reader.path

    def read(self, keys: Collection[str]) -> Mapping[str, Any]:
        """Return the values of some keys, tensors whole and on the CPU.

        Raises:
            CheckpointError: The checkpoint is damaged, or no longer there.
        """
        if not keys:
            return {}
        planner = EmptyStateDictLoadPlanner(weights_only=self.weights_only, safe_globals=self.safe_globals)
        try:
            found = dcp.load_from_keys(storage_reader=self.reader.limited_to(self._metadata_of(keys)), planner=planner)
        except CheckpointException as exc:
            # Only this process has read: its own error is clearer than a list of all ranks' errors.
            raise next(iter(exc.failures.values()))[0] from None
        values: Mapping[str, Any] = found[self.name]
        return {text_of(key): value for key, value in values.items()}

    def _metadata_of(self, keys: Collection[str]) -> Metadata:
        whole = self.reader.read_metadata()
        if self._stored is None:
            self._stored = {}
            for index, info in (whole.storage_data or {}).items():
                if index.fqn in self._paths:
                    self._stored.setdefault(index.fqn, []).append((index, info))
        fqns = [fqn for key in keys for fqn in self._fqns[key]]
        made = Metadata(
            {fqn: whole.state_dict_metadata[fqn] for fqn in fqns},
            planner_data={fqn: self._paths[fqn] for fqn in fqns},
            storage_data={index: info for fqn in fqns for index, info in self._stored.get(fqn, ())},
            storage_meta=whole.storage_meta,
        )
        record = encoded_of(whole)
        if record is None:
            return made
        wanted = set(keys)
        mine = [entry for entry in record if entry[0][:1] == [self.name]]
        return attach(made, [entry for entry in mine if len(entry[0]) == 1 or str(entry[0][1]) in wanted])
