"""Copies from host to host are right for every size and layout, and shared out to threads."""

from __future__ import annotations

import threading

import pytest
import torch

from dcp_plugins.staging import host_copy
from dcp_plugins.staging.host_copy import copy_on_host

MIB = 1024 * 1024


def test_tensors_of_all_sizes_are_copied_to_the_last_byte() -> None:
    sizes = [0, 1, 100, 32_767, 32_768, 4 * MIB, 4 * MIB + 1, 9 * MIB + 5, *([1000] * 3000)]
    sources = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes]
    targets = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    copy_on_host(targets, sources)
    assert all(torch.equal(target, source) for target, source in zip(targets, sources, strict=True))


@pytest.mark.parametrize(
    "source",
    [
        torch.randn(300, 400).t(),
        torch.randn(100_000, dtype=torch.complex64).conj(),
        torch.randn(100_000, dtype=torch.complex64).conj().imag,
        torch.randn(1).expand(100_000),
        torch.nn.Parameter(torch.randn(100_000)),
        torch.randn(100_000).to(torch.bfloat16),
    ],
    ids=["transposed", "conjugate", "negated", "expanded", "parameter", "bfloat16"],
)
def test_every_layout_arrives_as_values(source: torch.Tensor) -> None:
    target = torch.zeros(source.shape, dtype=source.dtype)
    copy_on_host([target], [source])
    assert torch.equal(target, source)


def test_a_conversion_is_left_to_torch() -> None:
    source, target = torch.arange(100_000), torch.zeros(100_000)
    copy_on_host([target], [source])
    assert torch.equal(target, source.float())


def test_several_threads_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    together = threading.Barrier(2)
    memmove = host_copy.ctypes.memmove

    def watched(to: int, start: int, size: int) -> None:
        if threading.get_ident() not in seen:
            seen.add(threading.get_ident())
            together.wait(20)
        memmove(to, start, size)

    monkeypatch.setattr(host_copy.ctypes, "memmove", watched)
    monkeypatch.setattr(host_copy, "default_thread_count", lambda: 2)
    source = torch.randint(0, 256, (16 * MIB,), dtype=torch.uint8)
    target = torch.zeros_like(source)
    copy_on_host([target], [source])
    assert len(seen) == 2
    assert torch.equal(target, source)


def test_nothing_is_nothing() -> None:
    copy_on_host([], [])
