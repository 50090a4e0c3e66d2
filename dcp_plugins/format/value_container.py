"""Reads what ``torch.save`` or ``pickle`` wrote into a value: finds the pickle and the tensors' bytes, and decodes.

Three forms exist: the zip container of today, the stream of pickles that torch wrote before version 1.6, and a plain
pickle. No part of torch reads the file; the zip's directory is read by the same code as a tensor's container.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterable
from typing import Any

import torch

from dcp_plugins.errors import CorruptCheckpointError, UnsafeCheckpointError
from dcp_plugins.format.container import locate_records
from dcp_plugins.format.trust import SafeGlobal, Trust
from dcp_plugins.format.value_builders import builders
from dcp_plugins.format.value_decoder import Decoder
from dcp_plugins.format.value_errors import DecodingError, RefusedError
from dcp_plugins.format.value_tensors import StorageKind

__all__ = ["decode_value"]

# Torch's function has no annotations.
_TypedStorage: Any = torch.storage.TypedStorage
_UntypedStorage: Any = torch.UntypedStorage
_restore_location: Any = torch.serialization.default_restore_location

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


def decode_value(
    data: bytes | memoryview,
    where: str,
    *,
    safe_globals: Iterable[SafeGlobal] = (),
    map_location: str | torch.device | None = None,
    advice: str = "",
    share_memory: bool = False,
) -> Any:
    """Return the value in a container, legacy stream or pickle, without running what it names.

    Args:
        data: All bytes.
        where: Key and file, for error messages.
        safe_globals: Classes and functions that are called as pickle would, beside those of
            ``torch.serialization.add_safe_globals``.
        map_location: The device on which tensors arrive; None takes the one that each was saved from.
        advice: How the caller's user says that the file is trusted, for error messages.
        share_memory: Let the tensors of a container lie in ``data``, which must be writable.

    Raises:
        UnsafeCheckpointError: It needs a class that is neither listed nor trusted.
        CorruptCheckpointError: The bytes are no such value.
    """
    trust = Trust(safe_globals)
    try:
        if bytes(data[:4]) == b"PK\x03\x04":
            return _decode_container(memoryview(data), where, trust, map_location, share_memory=share_memory)
        return _decode_stream(bytes(data), trust, map_location)
    except RefusedError as exc:
        raise UnsafeCheckpointError(_refusal(where, exc, advice)) from None
    except CorruptCheckpointError:
        raise
    # Damaged opcodes and fields can make any call raise, with any error.
    except Exception as exc:
        reason = str(exc) if isinstance(exc, DecodingError) else f"{type(exc).__name__}: {exc}"
        raise CorruptCheckpointError(f"{where}: the saved value cannot be read: found {reason}") from exc


def _refusal(where: str, refused: RefusedError, advice: str) -> str:
    name = refused.name
    if refused.action == "is of a module that is never admitted":
        return f"{where}: the saved value needs {name}, which {refused.action}: it could act on the system"
    message = (
        f"{where}: the saved value needs {name}, which is not admitted by default: building it could run code. If it"
        f" is yours, admit it with torch.serialization.add_safe_globals([{name}]), or with safe_globals=[{name}]"
    )
    return f"{message}. {advice}" if advice else message


class _Location:
    """Chooses the devices of storages, as ``map_location`` says."""

    def __init__(self, map_location: str | torch.device | None) -> None:
        self._device = None if map_location is None else torch.device(map_location)

    def place(self, storage: Any, saved_on: Any) -> Any:
        if type(saved_on) is not str:
            raise DecodingError("a storage without a device")
        device = torch.device(saved_on) if self._device is None else self._device
        if device.type == "cpu":
            return storage
        return _restore_location(storage, str(device))


def _storage_id(pid: Any) -> tuple[torch.dtype, str, Any, int, Any]:
    """Return dtype, key, device, length in bytes, and the rest of the id of a storage."""
    if type(pid) is not tuple or len(pid) < 5 or pid[0] != "storage":
        raise DecodingError("a reference to something else than a tensor's data")
    _, kind, key, location, numel, *rest = pid
    if type(kind) is not StorageKind or type(key) is not str or type(numel) is not int or numel < 0:
        raise DecodingError("a storage of unknown type")
    return kind.dtype, key, location, numel * kind.dtype.itemsize, rest[0] if rest else None


def _decode_container(
    data: memoryview, where: str, trust: Trust, map_location: str | torch.device | None, *, share_memory: bool
) -> Any:
    spans = locate_records(data, where)
    if "data.pkl" not in spans:
        raise CorruptCheckpointError(f"{where}: the saved value cannot be read: the container has no record data.pkl")

    def record(name: str) -> memoryview:
        start, size = spans[name]
        return data[start : start + size]

    order = bytes(record("byteorder")).decode() if "byteorder" in spans else "little"
    location = _Location(map_location)
    storages: dict[str, Any] = {}

    def load_storage(pid: Any) -> Any:
        dtype, key, saved_on, nbytes, _ = _storage_id(pid)
        storage = storages.get(key)
        if storage is None:
            storage = storages[key] = placed(dtype, key, saved_on, nbytes)
        elif storage.nbytes() != nbytes:
            raise DecodingError(f"two lengths of storage {key}")
        return _TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)

    def placed(dtype: torch.dtype, key: str, saved_on: Any, nbytes: int) -> Any:
        if saved_on == "meta":
            return _UntypedStorage(nbytes, device="meta")
        name = f"data/{key}"
        if name not in spans or spans[name][1] != nbytes:
            raise DecodingError(f"a storage of {nbytes} bytes whose record {name} is missing or has another length")
        storage = _storage_in(record(name)) if share_memory else _storage_of(record(name))
        if order != sys.byteorder:
            storage.byteswap(dtype)
        return location.place(storage, saved_on)

    decoder = Decoder(bytes(record("data.pkl")), builders(), trust, load_storage=load_storage, size=len(data))
    return _finished(decoder, decoder.load())


def _storage_of(content: memoryview) -> Any:
    storage = _UntypedStorage(len(content))
    if len(content):
        target = torch.empty((0,), dtype=torch.uint8).set_(storage)
        target.numpy()[:] = content
    return storage


def _storage_in(content: memoryview) -> Any:
    """Return a storage over memory, without a copy."""
    return torch.frombuffer(content, dtype=torch.uint8).untyped_storage() if content else _UntypedStorage(0)


def _decode_stream(data: bytes, trust: Trust, map_location: str | torch.device | None) -> Any:
    first = Decoder(data, builders(), trust)
    value = first.load()
    if type(value) is int and value == _LEGACY_MAGIC:
        return _decode_legacy(data, first.position, trust, map_location)
    if first.position != len(data):
        raise DecodingError(f"{len(data) - first.position} bytes after the pickle")
    return _finished(first, value)


def _decode_legacy(data: bytes, position: int, trust: Trust, map_location: str | torch.device | None) -> Any:
    def read_plain(start: int) -> tuple[Any, int]:
        decoder = Decoder(data, builders(), trust, position=start)
        return decoder.load(), decoder.position

    version, position = read_plain(position)
    if version != _LEGACY_PROTOCOL:
        raise DecodingError(f"version {version!r:.80} of torch's stream")
    system, position = read_plain(position)
    order = "little" if system.get("little_endian", True) else "big"
    location = _Location(map_location)
    storages: dict[str, tuple[torch.dtype, Any, Any]] = {}
    promised = 0

    def load_storage(pid: Any) -> Any:
        nonlocal promised
        dtype, key, saved_on, nbytes, view = _storage_id(pid)
        if key not in storages:
            # The storage is allocated before its bytes are read, so the file must be as long as all storages together.
            promised += nbytes
            if promised > len(data):
                raise DecodingError("storages that are larger than the file")
            storage = _UntypedStorage(nbytes)
            storages[key] = (dtype, storage, location.place(storage, saved_on))
        if view is not None:
            raise DecodingError("a storage that is a view of another")
        return _TypedStorage(wrap_storage=storages[key][2], dtype=dtype, _internal=True)

    decoder = Decoder(data, builders(), trust, load_storage=load_storage, position=position)
    value = decoder.load()
    keys, position = read_plain(decoder.position)
    for key in keys:
        dtype, storage, placed = storages[key]
        (numel,) = struct.unpack_from("<q" if order == "little" else ">q", data, position)
        content = memoryview(data)[position + 8 : position + 8 + storage.nbytes()]
        if numel * dtype.itemsize != storage.nbytes() or len(content) != storage.nbytes():
            raise DecodingError(f"storage {key} of another length than its tensors need")
        storage.copy_(_storage_of(content))
        if order != sys.byteorder:
            storage.byteswap(dtype)
        if placed is not storage:
            placed.copy_(storage)
        position += 8 + len(content)
    return _finished(decoder, value)


def _finished(decoder: Decoder, value: Any) -> Any:
    for check in decoder.deferred:
        check()
    return value
