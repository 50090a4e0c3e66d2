"""Small tensors that are not one run of host memory, many at a time: through one block of host memory, which is.

A copy between a device and the host, with waiting for it, takes some tenth of a millisecond, whatever its size: two
seconds for the small tensors of a large model. Together they wait once.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch

from dcp_plugins.format.memory import DTYPES_WITHOUT_COPY, addresses_of, copyable
from dcp_plugins.pace import elsewhere
from dcp_plugins.storage.host_blocks import scratch
from dcp_plugins.storage.planned import Run, are_as_planned, check_against_plan

__all__ = ["copy_together", "host_slots", "small_on_host"]

_ALIGNMENT_BYTES = 64
_HOST = torch.device("cpu")

_dtype = operator.attrgetter("dtype")
_look = operator.attrgetter("layout", "is_quantized", "is_nested", "is_meta", "device")


def small_on_host(run: Run, data: Sequence[Any]) -> Sequence[torch.Tensor] | None:
    """Return the data of a run of small tensors as directly addressable tensors, copied where they are not.

    None where it is another run, or a tensor needs a second look.

    Raises:
        StorageWriteError: A tensor's memory has been freed.
    """
    if len(data) < 2 or not are_as_planned(run, data):
        return None
    if addresses_of(data) is not None:
        return data
    for item, tensor in zip(run.items, data, strict=True):
        # Check that the memory exists: copying from memory that does not ends the process.
        check_against_plan(item, tensor)
    layouts, quantized, nested, meta, devices = zip(*map(_look, data), strict=True)
    # Tensors of the host may be among those of a device: an optimizer's counts of steps are.
    devices_in_use = set(devices) - {_HOST}
    if set(layouts) != {torch.strided} or any(quantized) or any(nested) or any(meta) or len(devices_in_use) > 1:
        return None
    device = next(iter(devices_in_use), _HOST)
    slots = host_slots(data, device)
    copy_together(slots, data, device)
    return slots


def host_slots(like: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Return uninitialised, contiguous host tensors of the same shapes and dtypes, for copies from or to ``device``."""
    lengths = [-(-tensor.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for tensor in like]
    starts = [0, *itertools.accumulate(lengths)]
    block = scratch(starts[-1], device)
    return [
        block[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for tensor, start in zip(like, starts, strict=False)
    ]


@torch.no_grad()
def copy_together(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], device: torch.device) -> None:
    """Copy each source to the target at the same place, and wait for all; each is on the host or on ``device``."""
    on_cuda = device.type == "cuda"
    if not DTYPES_WITHOUT_COPY.isdisjoint(map(_dtype, sources)):
        targets, sources = list(map(copyable, targets)), list(map(copyable, sources))
    with elsewhere(), torch._C.DisableTorchFunctionSubclass():
        torch._foreach_copy_(list(targets), list(sources), non_blocking=on_cuda)
        if on_cuda:
            torch.cuda.current_stream(device).synchronize()
