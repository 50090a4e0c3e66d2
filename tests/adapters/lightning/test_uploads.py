"""Which loggers read checkpoints when they are told of them, and which of them skip our directories."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from dcp_plugins.lightning.uploads import any_reads_checkpoints, warn_of_missing_uploads


class Uploading(WandbLogger):
    """Uploads in its own way, whatever ``log_model`` says."""

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        pass


class Scanning(MLFlowLogger):
    """Finds directories, too."""

    def _scan_and_log_checkpoints(self, checkpoint_callback: Any) -> None:
        pass


def logger(kind: type[Logger], log_model: Any = False) -> Logger:
    """Make a logger without its service's package."""
    made: Any = object.__new__(kind)
    made._log_model = log_model
    return made  # type: ignore[no-any-return]


def test_training_waits_for_loggers_that_read_directories_and_for_no_others() -> None:
    for reads in (logger(Uploading), logger(Uploading, True), logger(Scanning, "all")):
        assert any_reads_checkpoints([logger(CSVLogger), reads])
    skip = [logger(WandbLogger, "all"), logger(MLFlowLogger, True)]
    assert not any_reads_checkpoints([*skip, *map(logger, (WandbLogger, Scanning, CSVLogger, TensorBoardLogger))])


def test_a_warning_names_the_loggers_that_will_upload_nothing() -> None:
    with pytest.warns(UserWarning, match="MLFlowLogger, WandbLogger will upload no checkpoints"):
        warn_of_missing_uploads([logger(WandbLogger, "all"), logger(MLFlowLogger, True), logger(Scanning, True)])
    warn_of_missing_uploads([logger(WandbLogger), logger(Uploading, True), logger(Scanning, True)])
