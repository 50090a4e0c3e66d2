"""Stream transforms: extensions that change an item's bytes on the way to storage and back, such as compression.

The extensions' interface is torch's. A writer records each item's descriptors in the metadata; a reader finds the
decoders by them in its ``ExtensionRegistry``.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
from collections.abc import Sequence
from typing import IO, Any, cast

from dcp_plugins import progress
from dcp_plugins.contract import Extension, StreamTransformExtension
from dcp_plugins.errors import CorruptCheckpointError, MissingExtraError

__all__ = ["ExtensionRegistry", "ZStandard", "decode_stream", "encode_stream"]


class ZStandard(StreamTransformExtension):
    """Compress items with Zstandard; needs the package ``zstandard``. Descriptor ``stream.zstd/1``, as torch's."""

    def __init__(self) -> None:
        try:
            self._zstandard = importlib.import_module("zstandard")
        except ImportError as exc:
            raise MissingExtraError(
                "the Zstandard transform needs the package 'zstandard': pip install zstandard"
            ) from exc

    @staticmethod
    def is_available() -> bool:
        """Whether the package it needs is installed."""
        return importlib.util.find_spec("zstandard") is not None

    @staticmethod
    def registry_name() -> str:
        return "stream.zstd"

    @staticmethod
    def from_descriptor(version: str) -> ZStandard:
        if version.split(".", maxsplit=1)[0] != "1":
            raise ValueError(f"stream.zstd: expected version 1, found {version!r}")
        return ZStandard()

    def get_descriptor(self) -> str:
        return f"{self.registry_name()}/1"

    def transform_to(self, output: IO[bytes]) -> IO[bytes]:
        return cast("IO[bytes]", self._zstandard.ZstdCompressor().stream_writer(output))

    def transform_from(self, input: IO[bytes]) -> IO[bytes]:
        return cast("IO[bytes]", self._zstandard.ZstdDecompressor().stream_reader(input))


class ExtensionRegistry:
    """Finds the extension that a descriptor (``name[@domain][/version]``) asks for."""

    def __init__(self) -> None:
        self.extensions: dict[str, type[Extension]] = {ZStandard.registry_name(): ZStandard}

    def register(self, cls: type[Extension]) -> None:
        """Make an extension known under its ``registry_name()``."""
        self.extensions[cls.registry_name()] = cls

    def from_descriptor_list(self, descriptors: Sequence[str]) -> list[Extension]:
        """Return the extensions, in the order of ``descriptors``.

        Raises:
            ValueError: One of them is unknown; the message lists the known ones.
        """
        found = []
        for descriptor in descriptors:
            name, _, version = descriptor.partition("/")
            if name not in self.extensions:
                raise ValueError(
                    f"unknown extension {name!r}: known are {sorted(self.extensions)}; register it with "
                    "ExtensionRegistry.register and pass the registry to the reader"
                )
            found.append(self.extensions[name].from_descriptor(version))
        return found


class _Sink(io.RawIOBase):
    """Collects what the innermost transform writes; survives being closed by it."""

    def __init__(self) -> None:
        self.content = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.content += view
        progress.step()
        return len(view)

    def close(self) -> None:
        """Stay open: transforms close what they write to, the content is still wanted."""


def encode_stream(extensions: Sequence[StreamTransformExtension], parts: Sequence[Any]) -> bytes:
    """Return the bytes of ``parts`` as they come out of all ``extensions``, the last one applied first."""
    sink = _Sink()
    stream = cast("IO[bytes]", sink)
    for extension in extensions:
        stream = extension.transform_to(stream)
    for part in parts:
        stream.write(part)
    stream.close()
    return bytes(sink.content)


def decode_stream(extensions: Sequence[Extension], data: bytes, where: str) -> bytes:
    """Return what ``encode_stream`` was given.

    Raises:
        CorruptCheckpointError: A decoder failed on the data.
    """
    stream = cast("IO[bytes]", io.BytesIO(data))
    for extension in extensions:
        if isinstance(extension, StreamTransformExtension):
            stream = extension.transform_from(stream)
    try:
        return stream.read(-1)
    # Each codec has its own errors for damaged input.
    except Exception as exc:
        raise CorruptCheckpointError(f"{where}: the stream cannot be decoded: {exc}") from exc
