"""A writer and a reader with a file system of the user's own keep the storage contract; so does stock torch's pair."""

from __future__ import annotations

from typing import Any

import dcp_plugins as dcp
from dcp_plugins.testing.storage_contract import StorageContract
from tests.engine.file_systems import StockStreamsReader, StockStreamsWriter, StreamsReader, StreamsWriter


class TestOwnFileSystem(StorageContract):
    def make_writer(self, checkpoint_id: Any) -> dcp.StorageWriter:
        return StreamsWriter(checkpoint_id)

    def make_reader(self, checkpoint_id: Any) -> dcp.StorageReader:
        return StreamsReader(checkpoint_id)


class TestOwnFileSystemToStock(TestOwnFileSystem):
    def make_reader(self, checkpoint_id: Any) -> dcp.StorageReader:
        return StockStreamsReader(checkpoint_id)


class TestStockToOwnFileSystem(TestOwnFileSystem):
    replaces_safely = False

    def make_writer(self, checkpoint_id: Any) -> dcp.StorageWriter:
        return StockStreamsWriter(checkpoint_id)
