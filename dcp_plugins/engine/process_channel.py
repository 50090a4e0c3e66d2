"""Messages between a training process and its checkpoint process, over a Unix socket that carries descriptors too."""

from __future__ import annotations

import os
import pickle
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

__all__ = ["Channel"]

T = TypeVar("T")

_WATCH_SECONDS = 1.0
# Length of the pickled message in bytes.
_HEADER = struct.Struct(">Q")


class Channel:
    """One end of the socket. Any thread may send; one at a time receives."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._send_lock = threading.Lock()
        self._watch: Callable[[float], None] | None = None

    def watched_by(self, watch: Callable[[float], None]) -> None:
        """Call ``watch`` every second in which this end waits, with the monotonic time since when; it may raise."""
        self._watch = watch
        self._socket.settimeout(_WATCH_SECONDS)

    def _patiently(self, call: Callable[[], T]) -> T:
        began = time.monotonic()
        while True:
            try:
                return call()
            except TimeoutError:
                assert self._watch is not None, "only a watched channel has a timeout"
                self._watch(began)

    def _send_all(self, buffer: Any) -> None:
        left = memoryview(buffer).cast("B")
        while left:
            left = left[self._patiently(partial(self._socket.send, left)) :]

    def send(self, message: Any, *, descriptor: int | None = None, followed_by: Iterable[Any] = ()) -> None:
        """Send a message that pickles.

        Args:
            message: What the other end's ``receive`` returns.
            descriptor: A duplicate of it goes with the message.
            followed_by: Buffers whose bytes come right behind it, for as many ``receive_into``.

        Raises:
            OSError: The other end is gone.
        """
        payload = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        header = _HEADER.pack(len(payload))
        with self._send_lock:
            if descriptor is None:
                self._send_all(header)
            else:
                # Eight bytes on a stream socket go out in one piece.
                self._patiently(partial(socket.send_fds, self._socket, [header], [descriptor]))
            self._send_all(payload)
            for buffer in followed_by:
                self._send_all(buffer)

    def receive(self) -> tuple[Any, int | None]:
        """Wait for a message; return it and the descriptor that came with it, which is the caller's to close.

        Raises:
            EOFError: The other end is gone.
        """
        header, descriptors, _, _ = self._patiently(partial(socket.recv_fds, self._socket, _HEADER.size, 1))
        descriptor = descriptors[0] if descriptors else None
        try:
            rest = bytearray(_HEADER.size - len(header))
            self.receive_into(rest)
            (length,) = _HEADER.unpack(header + rest)
            payload = bytearray(length)
            self.receive_into(payload)
        except BaseException:
            if descriptor is not None:
                os.close(descriptor)
            raise
        # The two ends are one program: what comes here is as trusted as this process.
        return pickle.loads(payload), descriptor  # noqa: S301

    def receive_into(self, buffer: Any) -> None:
        """Fill the buffer with bytes that follow a message.

        Raises:
            EOFError: The other end is gone.
        """
        left = memoryview(buffer).cast("B")
        while left:
            count = self._patiently(partial(self._socket.recv_into, left))
            if not count:
                raise EOFError("the other end of the channel is closed")
            left = left[count:]

    def close(self) -> None:
        """End the connection: the other end finds end of file."""
        self._socket.close()
