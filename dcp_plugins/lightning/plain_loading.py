"""Let Lightning's own loaders take a directory: ``Model.load_from_checkpoint(path)`` and ``--ckpt_path path``.

Lightning opens a path as one file in both places, and has no interface for another form. `patch_plain_loading` replaces
the two functions by ones that first check whether the path is a directory. They pass all other paths on to Lightning's
functions.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.core import saving

from dcp_plugins.errors import StorageDetectionError
from dcp_plugins.lightning.load import demand_committed, moved, open_directory
from dcp_plugins.lightning.paths import local_path
from dcp_plugins.manager import is_committed
from dcp_plugins.manager.in_flight import wait_for_all

__all__ = ["patch_plain_loading"]

_HPARAMS = "hyper_parameters"


def patch_plain_loading() -> None:
    """Let Lightning load directories where it loads files.

    The package calls this when it is imported. A second call does nothing.
    """
    module: Any = saving
    if not isinstance(module.pl_load, _Loader):
        module.pl_load = _Loader(module.pl_load)
    if not hasattr(LightningCLI._parse_ckpt_path, "__wrapped__"):
        parse: Any = _parsing_directories(LightningCLI._parse_ckpt_path)
        LightningCLI._parse_ckpt_path = parse  # type: ignore[method-assign]


class _Loader:
    """Loads a directory, or calls Lightning's function for any other path."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self._original = original

    def __call__(
        self, path_or_url: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        directory = _directory_at(path_or_url)
        if directory is None:
            loaded: dict[str, Any] = self._original(path_or_url, map_location=map_location, weights_only=weights_only)
            return loaded
        checkpoint = open_committed(directory, weights_only=weights_only is not False)
        # Lightning's default keeps a tensor on the device that it was read to, which is the CPU.
        if map_location is not saving._default_map_location and "state_dict" in checkpoint:
            checkpoint.update(moved({"state_dict": checkpoint["state_dict"]}, map_location))
        return checkpoint


def open_committed(path: Path, *, weights_only: bool) -> dict[str, Any]:
    """Return a directory's checkpoint, as `open_directory` does.

    Raises:
        CheckpointNotFoundError: The directory has no committed checkpoint.
    """
    demand_committed(path)
    return open_directory(path, weights_only=weights_only)


def _directory_at(path: Any) -> Path | None:
    if not isinstance(path, (str, Path)):
        return None
    try:
        local = local_path(path)
    except StorageDetectionError:
        return None
    if not local.exists():
        # `save_last="link"` makes a link after the commit of its target, and names the link before.
        wait_for_all()
    return local if local.is_dir() else None


def _parsing_directories(original: Callable[[LightningCLI], None]) -> Callable[[LightningCLI], None]:
    @functools.wraps(original)
    def parse(cli: LightningCLI) -> None:
        command = cli.config.get("subcommand")
        given = cli.config[command].get("ckpt_path") if command else None
        directory = _directory_at(given) if given else None
        if directory is None or not is_committed(directory):
            original(cli)
            return
        # Lightning reads hyper-parameters from a file: write a temporary file that holds nothing else.
        with tempfile.TemporaryDirectory() as folder:
            file = os.path.join(folder, "hyper_parameters.ckpt")
            torch.save({_HPARAMS: open_committed(directory, weights_only=True).get(_HPARAMS, {})}, file)
            cli.config[command]["ckpt_path"] = file
            try:
                original(cli)
            finally:
                cli.config[command]["ckpt_path"] = given

    return parse
