"""How this package takes the place of each framework's own checkpoints, in every object that a test makes."""

from __future__ import annotations

import functools
import importlib
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

__all__ = ["swap_accelerate", "swap_lightning", "swap_transformers"]


def swap_accelerate(module: ModuleType, mode: str) -> None:
    """Let every ``Accelerator`` save through this package."""

    def swap(self: Any) -> None:
        from dcp_plugins.accelerate import DCPPlugin, enable

        enable(self, DCPPlugin(asynchronous=mode))

    _after_init(module.Accelerator, swap)
    _finish_saves_before_folders_go()


def _finish_saves_before_folders_go() -> None:
    """Let a temporary folder be deleted only when the saves in flight, and what follows them, are done."""
    clean_up = tempfile.TemporaryDirectory.cleanup

    @functools.wraps(clean_up)
    def finished(self: Any) -> None:
        from dcp_plugins.manager.in_flight import wait_for_all

        wait_for_all()
        clean_up(self)

    tempfile.TemporaryDirectory.cleanup = finished  # type: ignore[method-assign]


def swap_transformers(module: ModuleType, mode: str) -> None:
    """Give every ``Trainer`` the callback."""

    def swap(self: Any) -> None:
        from dcp_plugins.transformers import DCPCallback

        self.add_callback(DCPCallback(asynchronous=mode, hf_weights=True))

    _after_init(module.Trainer, swap)
    os.path.isfile = _finding_parts(os.path.isfile)


def _finding_parts(is_file: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Let the tests find stock's files in a committed checkpoint of ours: its own data has their contents."""
    in_our_data = ("optimizer.pt", "scheduler.pt", "scaler.pt")

    @functools.wraps(is_file)
    def found(path: Any) -> bool:
        if is_file(path):
            return True
        directory, name = os.path.split(path)
        asking = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
        of_a_test = asking not in ("accelerate", "dcp_plugins", "transformers")
        return of_a_test and name in in_our_data and is_file(os.path.join(directory, ".metadata"))

    return found


def swap_lightning(module: ModuleType, mode: str) -> None:
    """Give every ``Trainer`` and ``Fabric`` the flag that stands for the strategy that stock would take."""
    from lightning.fabric import connector
    from lightning.fabric import strategies as of_fabric
    from lightning.pytorch import strategies
    from lightning.pytorch.trainer.connectors import accelerator_connector

    _swap_flags(accelerator_connector._AcceleratorConnector, strategies, "dcp_plugins.lightning", mode)
    _swap_flags(connector._Connector, of_fabric, "dcp_plugins.lightning.fabric", mode)
    _open_directories()


def _swap_flags(kind: type, strategies: ModuleType, package: str, mode: str) -> None:
    """Let a connector choose our strategy of a package in place of the stock strategy that it would take."""
    flags = {
        strategies.SingleDeviceStrategy: "dcp",
        strategies.DDPStrategy: "dcp_ddp",
        strategies.FSDPStrategy: "dcp_fsdp",
        strategies.ModelParallelStrategy: "dcp_fsdp2",
    }
    make: Any = kind.__init__  # type: ignore[misc]

    @functools.wraps(make)
    def made(self: Any, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        # A test that gives a strategy object or a `CheckpointIO` keeps it.
        flag = flags.get(type(self.strategy))
        has_own_io = self.checkpoint_io is not None or self.strategy._checkpoint_io is not None
        if flag is None or not isinstance(options.get("strategy", "auto"), str) or has_own_io:
            return
        ours: Any = importlib.import_module(package)  # Its import registers the flags.
        start_method = getattr(self.strategy, "_start_method", "popen")
        of_ddp = getattr(self.strategy, "_ddp_kwargs", {})
        swapped: Any = flag if mode == "sync" else f"{flag}_async"
        if start_method != "popen" or of_ddp:
            swapped = ours.DCPDDPStrategy(asynchronous=mode == "async", start_method=start_method, **of_ddp)
        # The strategy that Fabric's command line has set would contradict ours.
        set_by_command_line = os.environ.pop("LT_STRATEGY", None)
        try:
            make(self, *args, **{**options, "strategy": swapped})
        finally:
            if set_by_command_line is not None:
                os.environ["LT_STRATEGY"] = set_by_command_line

    kind.__init__ = made  # type: ignore[misc]


def _open_directories() -> None:
    """Let the tests open our directories, find files there, and replace them by a file, as with stock's checkpoints."""
    from lightning.fabric.utilities import cloud_io

    os.path.isfile = _finding_directories(os.path.isfile)
    Path.is_file = _finding_directories(Path.is_file)  # type: ignore[method-assign]
    torch.load = _opening_directories(torch.load)
    torch.save = _replacing_directories(torch.save)
    # Lightning's own modules have imported the function before; only the tests get this one.
    cloud_io._load = _opening_directories(cloud_io._load)


def _finding_directories(is_file: Callable[[Any], bool]) -> Callable[[Any], bool]:
    @functools.wraps(is_file)
    def found(path: Any) -> bool:
        if is_file(path):
            return True
        asking = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
        return asking not in ("dcp_plugins", "lightning") and os.path.exists(os.path.join(path, ".metadata"))

    return found


def _opening_directories(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def opened(file: Any, *args: Any, **options: Any) -> Any:
        if isinstance(file, (str, os.PathLike)) and os.path.isdir(file):
            from dcp_plugins.lightning import DCPCheckpointIO

            return DCPCheckpointIO().load_checkpoint(file, weights_only=options.get("weights_only"))
        return load(file, *args, **options)

    return opened


def _replacing_directories(save: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(save)
    def replaced(value: Any, file: Any, *args: Any, **options: Any) -> None:
        if not (isinstance(file, (str, os.PathLike)) and os.path.isdir(file)):
            save(value, file, *args, **options)
            return
        # The values may be read from the directory while they are saved.
        buffer = io.BytesIO()
        save(value, buffer, *args, **options)
        shutil.rmtree(file)
        Path(file).write_bytes(buffer.getvalue())

    return replaced


def _after_init(kind: type, swap: Callable[[Any], None]) -> None:
    make = kind.__init__

    @functools.wraps(make)
    def made(self: Any, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        swap(self)

    kind.__init__ = made  # type: ignore[misc]
