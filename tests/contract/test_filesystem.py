"""The local file system keeps the storage contract, with its options either way; so do torch's own classes."""

from __future__ import annotations

from typing import Any

import torch.distributed.checkpoint as stock

import dcp_plugins as dcp
from dcp_plugins.testing.storage_contract import StorageContract


class TestFileSystem(StorageContract):
    def make_writer(self, checkpoint_id: Any) -> dcp.StorageWriter:
        return dcp.FileSystemWriter(checkpoint_id)

    def make_reader(self, checkpoint_id: Any) -> dcp.StorageReader:
        return dcp.FileSystemReader(checkpoint_id)


class TestFilePerItem(TestFileSystem):
    def make_writer(self, checkpoint_id: Any) -> dcp.StorageWriter:
        return dcp.FileSystemWriter(checkpoint_id, single_file_per_rank=False, sync_files=False, thread_count=3)


class TestStock(StorageContract):
    """The contract asks for no more than torch's writer gives, but for the safety of what was there before."""

    replaces_safely = False

    def make_writer(self, checkpoint_id: Any) -> stock.StorageWriter:
        return stock.FileSystemWriter(checkpoint_id)

    def make_reader(self, checkpoint_id: Any) -> stock.StorageReader:
        return stock.FileSystemReader(checkpoint_id)


class TestOursToStock(TestFileSystem):
    def make_reader(self, checkpoint_id: Any) -> stock.StorageReader:
        return stock.FileSystemReader(checkpoint_id)


class TestStockToOurs(TestStock):
    def make_reader(self, checkpoint_id: Any) -> dcp.StorageReader:
        return dcp.FileSystemReader(checkpoint_id)
