"""URLs are refused by name before anything is written: nothing lands in a local directory of that name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from dcp_plugins.errors import StorageDetectionError
from dcp_plugins.lightning import (
    DCPCheckpointIO,
    consolidate,
    is_committed,
    last_checkpoint,
    load_from_checkpoint,
    remove_uncommitted,
)
from dcp_plugins.testing.ranks import run_ranks
from tests.adapters.lightning.trainers import Regression, Ticks, fit, trainer

URL = "memory://bucket/run"


def refused(act: Callable[[], Any]) -> None:
    with pytest.raises(StorageDetectionError, match=f"the URL '{URL}"):
        act()


def use_urls(flags: list[str], folder: Path) -> list[str]:
    os.chdir(folder)
    for flag in flags:
        for callback in (ModelCheckpoint(URL), OnExceptionCheckpoint(URL)):
            module = Regression()
            refused(
                lambda flag=flag, module=module, one=callback: fit(
                    flag, devices=2, steps=1, module=module, callbacks=[one]
                )
            )
            assert module.losses == {}, "the run is refused before its first step"
        runner = trainer(flag, devices=2, steps=1)
        runner.fit(Regression(), Ticks(1))
        refused(lambda runner=runner: runner.save_checkpoint(f"{URL}/a.ckpt"))
        refused(lambda runner=runner: runner.validate(Regression(), Ticks(1), ckpt_path=f"{URL}/a.ckpt"))
        fabric = Fabric(accelerator="cpu", devices=2, strategy=flag)
        fabric.launch()
        refused(lambda fabric=fabric: fabric.save(f"{URL}/a", {"step": 1}))
        refused(lambda fabric=fabric: fabric.load(f"{URL}/a", {"step": 1}))
    return os.listdir(folder)


def test_every_flag_refuses_urls(tmp_path: Path) -> None:
    flags = ["dcp_ddp", "dcp_ddp_async", "dcp_fsdp", "dcp_fsdp2"]
    assert run_ranks(2, use_urls, flags, tmp_path) == [[], []]


def test_urls_are_refused_without_a_strategy_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plugin = DCPCheckpointIO()
    checkpoint = {"state_dict": Regression().state_dict()}
    refused(lambda: plugin.save_checkpoint(checkpoint, URL))
    refused(lambda: plugin.begin_save(checkpoint, URL))
    refused(lambda: plugin.load_checkpoint(URL))
    refused(lambda: plugin.remove_checkpoint(URL))
    refused(lambda: last_checkpoint(URL))
    refused(lambda: remove_uncommitted(URL))
    refused(lambda: load_from_checkpoint(Regression, URL))
    refused(lambda: consolidate(URL, tmp_path / "file"))
    assert os.listdir(tmp_path) == []


def test_a_url_of_a_local_file_is_a_path(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    runner = trainer("dcp", devices=1, steps=1)
    runner.fit(Regression(), Ticks(1))
    runner.save_checkpoint(f"file://{path}")
    assert is_committed(path)
    runner.validate(Regression(), Ticks(1), ckpt_path=f"file://{path}", verbose=False)
    assert last_checkpoint(f"file://{tmp_path}") == path
