"""Copies between devices and host memory, on streams of their own so that they run beside the training's kernels."""

from __future__ import annotations

import operator
from typing import Any

import torch

from dcp_plugins.staging.host_copy import copy_on_host
from dcp_plugins.staging.huge_pages import huge_pages

__all__ = ["Copies"]


class Copies:
    """The copies of one stager. ``mark`` on the caller's thread, then ``start`` and ``wait`` on the staging thread.

    Without an accelerator all of it is a plain copy.

    Args:
        non_blocking: Let copies from a device run while the host goes on, until ``wait``.
    """

    def __init__(self, *, non_blocking: bool) -> None:
        self._non_blocking = non_blocking
        self._streams: dict[torch.device, torch.Stream] = {}
        self._marks: dict[torch.device, torch.Event] = {}
        self._current_device: int | None = None
        # Sources of copies under way: their memory must not be reused before the copies have ended.
        self._under_way: list[torch.Tensor] = []

    def mark(self) -> None:
        """Note how far the caller's stream has come: copies take the values that are computed by then."""
        if _accelerator_in_use() is not None:
            stream = torch.accelerator.current_stream()
            event = torch.Event(stream.device)
            event.record(stream)
            self._marks = {stream.device: event}
            self._current_device = torch.accelerator.current_device_index()

    def start(self, targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        """Copy host sources now, and begin to copy those on devices."""
        if all(map(_is_on_host, sources)):
            copy_on_host(targets, sources)
            return
        by_device: dict[torch.device, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for target, source in zip(targets, sources, strict=True):
            pair = by_device.get(source.device)
            if pair is None:
                pair = by_device[source.device] = ([], [])
            pair[0].append(target)
            pair[1].append(source)
        host = by_device.pop(torch.device("cpu"), None)
        # Devices first: their copies then run during the host's.
        for device, (device_targets, device_sources) in by_device.items():
            self._start_from(device, device_targets, device_sources)
        if host is not None:
            copy_on_host(*host)

    def wait(self) -> None:
        """Wait until all copies have ended."""
        for stream in self._streams.values():
            stream.synchronize()
        self._under_way = []

    def close(self) -> None:
        """Let go of the streams."""
        self.wait()
        self._streams = {}
        self._marks = {}

    def forget(self) -> None:
        """In a forked child: what is under way is the parent's."""
        # Kept: to destroy an event is a call to the device, which a child must not make.
        _of_parents.append((self._streams, self._marks, self._under_way))
        self._streams, self._marks, self._under_way = {}, {}, []

    def _start_from(self, device: torch.device, targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        accelerator = _accelerator_in_use()
        if accelerator is None or device.type != accelerator.type:
            _copy(targets, sources, non_blocking=False)
            return
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = torch.Stream(device)
        mark = self._marks.get(device)
        if mark is None:
            # Another device than the caller's current one: which of its streams writes the tensors is not known.
            torch.accelerator.synchronize(device)
        else:
            stream.wait_event(mark)
        self._under_way.extend(sources)
        if self._current_device is not None and torch.accelerator.current_device_index() != self._current_device:
            # On a thread of the stager's, whose current device would be the first of the machine: leaving the stream
            # would make that current again, and with it hundreds of megabytes of a context there, for every rank.
            torch.accelerator.set_device_index(self._current_device)
        with stream:
            _copy(targets, sources, non_blocking=self._non_blocking)


# What a fork has inherited.
_of_parents: list[Any] = []

_is_on_host = operator.attrgetter("is_cpu")


def _accelerator_in_use() -> torch.device | None:
    """Return the kind of device whose streams this process computes on, if any.

    A build of torch for CUDA names CUDA on a machine without a device too. And where there is one that this process has
    not used, asking for its stream would take hundreds of megabytes there for a context.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    # MPS has one queue for everything: its copies are ordered after the caller's kernels as it is.
    if accelerator is None or accelerator.type == "mps":
        return None
    is_initialized = getattr(torch.get_device_module(accelerator), "is_initialized", None)
    return accelerator if is_initialized is None or is_initialized() else None


@torch.no_grad()
def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor], *, non_blocking: bool) -> None:
    if targets:
        huge_pages.make_for(targets)
        # One call for all: with thousands of small tensors the calls would cost more than the bytes.
        with torch._C.DisableTorchFunctionSubclass():
            torch._foreach_copy_(targets, sources, non_blocking=non_blocking)
