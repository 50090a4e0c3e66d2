"""Small tensors that are not one run of host memory, many at a time: through one block of host memory, which is.

A copy between a device and the host, with waiting for it, takes some tenth of a millisecond, whatever its size: two
seconds for the small tensors of a large model. Together they wait once.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence

import torch

from dcp_plugins.format.memory import PLAIN_TENSORS
from dcp_plugins.pace import elsewhere
from dcp_plugins.storage.host_blocks import scratch

__all__ = ["copies_on_host", "copy_together", "host_slots"]

_ALIGNMENT_BYTES = 64

_look = operator.attrgetter("layout", "is_quantized", "is_nested", "is_meta", "device")


def copies_on_host(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
    """Return contiguous copies in host memory, or None where a tensor needs a second look.

    Args:
        tensors: At least one, in all few enough to be worth a buffer. All have their memory.
    """
    if not PLAIN_TENSORS.issuperset(map(type, tensors)):
        return None
    layouts, quantized, nested, meta, devices = zip(*map(_look, tensors), strict=True)
    if set(layouts) != {torch.strided} or any(quantized) or any(nested) or any(meta) or len(set(devices)) != 1:
        return None
    slots = host_slots(tensors, devices[0])
    copy_together(slots, tensors)
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
def copy_together(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy each source to the target at the same place, and wait for all; targets are on one device, so are sources."""
    device = next((tensor.device for tensor in (targets[0], sources[0]) if tensor.device.type == "cuda"), None)
    with elsewhere(), torch._C.DisableTorchFunctionSubclass():
        torch._foreach_copy_(list(targets), list(sources), non_blocking=device is not None)
        if device is not None:
            torch.cuda.current_stream(device).synchronize()
