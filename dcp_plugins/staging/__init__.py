"""Staging: the snapshot that an asynchronous save writes from while training goes on."""

from __future__ import annotations

from dcp_plugins.contract import AsyncStager
from dcp_plugins.staging.kept_memory import PartialSnapshot
from dcp_plugins.staging.overlap import OverlappedStager
from dcp_plugins.staging.stagers import (
    BlockingAsyncStager,
    DefaultStager,
    HandoverStager,
    StagingOptions,
    release_staging_memory,
    shared_stager,
    staging_memory_bytes,
)

__all__ = [
    "AsyncStager",
    "BlockingAsyncStager",
    "DefaultStager",
    "HandoverStager",
    "OverlappedStager",
    "PartialSnapshot",
    "StagingOptions",
    "release_staging_memory",
    "shared_stager",
    "staging_memory_bytes",
]
