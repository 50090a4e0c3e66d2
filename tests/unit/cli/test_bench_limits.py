"""The bare system calls that the benchmark holds up as the limit."""

from __future__ import annotations

import os

import pytest
import torch

from dcp_plugins.cli.bench import limits
from dcp_plugins.cli.bench.limits import Limit


def tensors():
    sizes = [5, 0, 1, 17, 3000, 2, 2, 9]
    return [torch.arange(size, dtype=torch.float32) + index for index, size in enumerate(sizes)] + [torch.tensor(3.0)]


@pytest.mark.parametrize("num_threads", [1, 2, 3, 20])
@pytest.mark.parametrize("buffers_per_call", [1, 2, 1024])
def test_what_is_written_is_read_back(tmp_path, monkeypatch, num_threads, buffers_per_call):
    monkeypatch.setattr(limits, "_MAX_BUFFERS_PER_CALL", buffers_per_call)
    source = tensors()
    target = [torch.zeros_like(tensor) for tensor in source]
    limit = Limit(source, target, num_threads=num_threads, sync=True)
    limit.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == num_threads
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == sum(tensor.nbytes for tensor in source)
    limit.load(tmp_path)
    assert all(torch.equal(left, right) for left, right in zip(source, target, strict=True))


def test_calls_that_move_less_than_asked_are_continued(tmp_path, monkeypatch):
    whole_write, whole_read = os.writev, os.preadv

    def first_bytes(buffers):
        return [next(buffer for buffer in buffers if len(buffer))[:7]] if any(map(len, buffers)) else buffers

    monkeypatch.setattr(os, "writev", lambda file, buffers: whole_write(file, first_bytes(buffers)))
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: whole_read(file, first_bytes(buffers), offset))
    source = tensors()[:4]
    target = [torch.zeros_like(tensor) for tensor in source]
    limit = Limit(source, target, num_threads=1, sync=False)
    limit.save(tmp_path)
    limit.load(tmp_path)
    assert all(torch.equal(left, right) for left, right in zip(source, target, strict=True))


def test_threads_get_even_shares_of_the_bytes():
    sizes = [100, 1, 1, 1, 50, 50]
    shares = limits._balance(sizes, 2)
    assert sorted(index for share in shares for index in share) == list(range(6))
    assert sorted(sum(sizes[index] for index in share) for share in shares) == [101, 102]


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_truncated_file_is_an_error_and_not_a_fast_read(tmp_path, num_threads):
    source = tensors()
    limit = Limit(source, source, num_threads=num_threads, sync=False)
    limit.save(tmp_path)
    for path in tmp_path.iterdir():
        os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(OSError, match="the file ends at byte"):
        limit.load(tmp_path)


def test_an_error_in_a_thread_reaches_the_caller(tmp_path):
    source = tensors()
    with pytest.raises(FileNotFoundError):
        Limit(source, source, num_threads=2, sync=False).save(tmp_path / "missing")
