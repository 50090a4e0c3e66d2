"""Files that other libraries wrote and that are read whole: one ``torch.save`` file, or one safetensors file.

Such a file is mapped, not read: its tensors lie in the mapped pages, which a write of the caller's copies. A large file
takes no memory twice.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import torch

from dcp_plugins.errors import CorruptCheckpointError
from dcp_plugins.format.container import crc32, record_checksums
from dcp_plugins.format.safetensors_header import parse_header
from dcp_plugins.format.value_container import decode_value
from dcp_plugins.storage.arrays import damaged
from dcp_plugins.storage.regular import open_regular

__all__ = ["read_safetensors_file", "read_torch_file"]


def read_torch_file(path: Path) -> Any:
    """Return the value in a file of ``torch.save``, decoded as plain data, with tensors on the CPU.

    Raises:
        FileNotFoundError: There is none.
        CorruptCheckpointError: The file is damaged, or ``torch.save`` did not write it.
        UnsafeCheckpointError: It needs a class that is not admitted, or it is no regular file of the checkpoint.
    """
    content = _mapped(path)
    if bytes(content[:4]) == b"PK\x03\x04":
        record_checksums(content, str(path))
    return decode_value(content, str(path), map_location="cpu", share_memory=True)


def read_safetensors_file(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file by name.

    Raises:
        FileNotFoundError: There is none.
        CorruptCheckpointError: The file is damaged, or no safetensors file.
        UnsafeCheckpointError: It is no regular file of the checkpoint.
    """
    content = _mapped(path)
    header = parse_header(lambda start, size: bytes(content[start : start + size]), len(content), str(path))
    tensors = {}
    for name, entry in header.tensors.items():
        raw = content[entry.start : entry.end]
        checksum = header.checksums.get(name)
        if checksum is not None and crc32(raw) != checksum:
            raise damaged(f"{path} ({name})", checksum, crc32(raw))
        # Tensors without elements have no memory that torch could take.
        data = torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
        if entry.start % entry.dtype.itemsize:
            data = data.clone()
        tensors[name] = data.view(entry.dtype).view(entry.shape)
    return tensors


def _mapped(path: Path) -> memoryview:
    fd, found = open_regular(path.parent, path.name)
    try:
        if not found.st_size:
            raise CorruptCheckpointError(f"{path} is empty: expected a checkpoint's file")
        # A private mapping may be written to, and leaves the file as it is.
        return memoryview(mmap.mmap(fd, found.st_size, access=mmap.ACCESS_COPY))
    except OSError as exc:
        exc.filename = str(path)
        raise
    finally:
        os.close(fd)
