"""Directories in the places where Lightning opens a file: ``load_from_checkpoint`` and the CLI's ``--ckpt_path``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.core import saving

from dcp_plugins.errors import CheckpointNotFoundError
from dcp_plugins.lightning import load_from_checkpoint
from dcp_plugins.lightning.plain_loading import patch_plain_loading
from tests.adapters.lightning.test_tools import Configured, Data
from tests.adapters.lightning.trainers import digest, trainer


def save(path: Path, flag: str = "dcp") -> dict[str, str]:
    runner = trainer(flag, devices=1, steps=2)
    module = Configured(lr=0.02, name="mine")
    runner.fit(module, datamodule=Data(size=3))
    runner.save_checkpoint(path)
    return digest(module.state_dict())


def test_lightnings_own_functions_load_directories(tmp_path: Path) -> None:
    weights = save(tmp_path / "a.ckpt")
    module = Configured.load_from_checkpoint(tmp_path / "a.ckpt")
    assert dict(module.hparams) == {"lr": 0.02, "name": "mine"}
    assert module.loaded_at == 2
    assert digest(module.state_dict()) == weights
    assert Configured.load_from_checkpoint(str(tmp_path / "a.ckpt"), name="other").hparams["name"] == "other"
    on_cpu = Configured.load_from_checkpoint(tmp_path / "a.ckpt", map_location=torch.device("cpu"), strict=False)
    assert digest(on_cpu.state_dict()) == weights
    data = Data.load_from_checkpoint(tmp_path / "a.ckpt")
    assert (data.hparams["size"], data.given) == (3, 2)


def test_files_load_as_before_and_a_directory_without_a_commit_is_refused(tmp_path: Path) -> None:
    weights = save(tmp_path / "file.ckpt", "auto")
    assert digest(Configured.load_from_checkpoint(tmp_path / "file.ckpt").state_dict()) == weights
    data = load_from_checkpoint(Data, tmp_path / "file.ckpt")
    assert (data.hparams["size"], data.given) == (3, 2)
    with pytest.raises(CheckpointNotFoundError, match="has no .metadata"):
        Configured.load_from_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError):
        Configured.load_from_checkpoint(tmp_path / "nothing")


def test_patching_twice_patches_once() -> None:
    before = saving.pl_load, LightningCLI._parse_ckpt_path
    patch_plain_loading()
    assert (saving.pl_load, LightningCLI._parse_ckpt_path) == before


class Program(LightningCLI):
    """A command line over the classes of these tests."""

    def __init__(self, *args: str) -> None:
        quiet: dict[str, Any] = {
            "accelerator": "cpu",
            "strategy": "dcp",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
        }
        super().__init__(Configured, Data, args=list(args), trainer_defaults=quiet, save_config_callback=None)


def test_the_command_line_takes_hyper_parameters_out_of_a_directory(tmp_path: Path) -> None:
    save(tmp_path / "a.ckpt")
    program = Program("fit", "--ckpt_path", str(tmp_path / "a.ckpt"), "--trainer.max_steps", "3")
    assert dict(program.model.hparams)["name"] == "mine"
    assert program.trainer.global_step == 3
    assert sorted(program.model.losses) == [2]
    assert str(program.config["fit"]["ckpt_path"]) == str(tmp_path / "a.ckpt")
