"""Options of the strategies and of `DCPCheckpointIO`: in code and through LightningCLI, and which contradict."""

from __future__ import annotations

import json
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.strategies import StrategyRegistry

from dcp_plugins.lightning import (
    DCPCheckpointIO,
    DCPDDPStrategy,
    DCPFSDP2Strategy,
    DCPFSDPStrategy,
    DCPSingleDeviceStrategy,
    fabric,
    is_committed,
)
from dcp_plugins.testing.ranks import run_ranks
from tests.adapters.lightning.test_async import every_step
from tests.adapters.lightning.trainers import Regression, Ticks, digest, fit, trainer
from tests.programs import run_program

STRATEGIES = pytest.mark.parametrize(
    "strategy",
    [DCPDDPStrategy, DCPFSDPStrategy, DCPFSDP2Strategy, DCPSingleDeviceStrategy, fabric.DCPFSDP2Strategy],
    ids=lambda value: f"{value.__module__.split('.')[-2]}.{value.__name__}",
)


@STRATEGIES
def test_a_strategys_options_reach_its_checkpoint_io(strategy: Any) -> None:
    made = strategy(asynchronous="process", thread_count=2, sync_files=False, overlap_staging=False)
    options = made.checkpoint_io.options
    assert (options.thread_count, options.sync_files, options.overlap_staging) == (2, False, False)
    assert made.checkpoint_io.asynchronous == made._asynchronous == "process"


@STRATEGIES
def test_where_saves_run_may_be_said_by_the_strategy_or_the_plugin(strategy: Any) -> None:
    for of_strategy, of_plugin, expected in (
        (None, None, "off"),
        (False, None, "off"),
        ("off", None, "off"),
        (True, None, "thread"),
        (True, "process", "process"),
        ("thread", "thread", "thread"),
        (None, "process", "process"),
        ("process", None, "process"),
    ):
        made = strategy(asynchronous=of_strategy)
        made.checkpoint_io = DCPCheckpointIO(asynchronous=of_plugin)
        assert made._asynchronous == expected, (of_strategy, of_plugin)


@STRATEGIES
def test_contradictions_are_refused_by_both_names(strategy: Any) -> None:
    with pytest.raises(ValueError, match=r"overlap_staging=False .*asynchronous=None has none"):
        strategy(overlap_staging=False)
    with pytest.raises(ValueError, match="asynchronous must be one of"):
        strategy(asynchronous="threads")
    with pytest.raises(ValueError, match="thread_count must be at least 1"):
        strategy(thread_count=0)
    with pytest.raises(ValueError, match="overlap_staging=False .*asynchronous='off'"):
        DCPCheckpointIO(asynchronous="off", overlap_staging=False)
    for of_strategy, of_plugin in ((True, "off"), (False, "thread"), ("thread", "process")):
        with pytest.raises(
            ValueError, match=rf"asynchronous={of_strategy!r} of .* asynchronous='{of_plugin}' of the DCP"
        ):
            strategy(asynchronous=of_strategy).checkpoint_io = DCPCheckpointIO(asynchronous=of_plugin)
    with pytest.raises(ValueError, match="thread_count given to .*, but a DCPCheckpointIO is there, too"):
        strategy(thread_count=2).checkpoint_io = DCPCheckpointIO()


def test_a_trainer_hands_a_plugin_to_a_flags_strategy() -> None:
    plugin = DCPCheckpointIO(asynchronous="process", thread_count=1)
    runner: Any = trainer("dcp_async", devices=1, steps=1, plugins=[plugin])
    assert runner.strategy.checkpoint_io is plugin
    assert runner.strategy._asynchronous == "process"
    assert StrategyRegistry.get("dcp_fsdp2_async")._asynchronous == "thread"


def save_in_a_process(folder: Path) -> None:
    strategy = DCPFSDP2Strategy(asynchronous="process", thread_count=1, sync_files=False)
    fit(strategy, devices=2, steps=3, callbacks=[every_step(folder)])


def test_a_process_of_its_own_writes_what_a_trainer_saves(tmp_path: Path) -> None:
    run_ranks(2, save_in_a_process, tmp_path / "process", timeout_seconds=120)
    run_ranks(2, save_each_step, tmp_path / "off")
    for step in (1, 2, 3):
        found, expected = (
            DCPCheckpointIO().load_checkpoint(tmp_path / kind / f"step={step}.ckpt") for kind in ("process", "off")
        )
        assert digest(found["state_dict"]) == digest(expected["state_dict"])
        assert found["loops"] == expected["loops"]
        assert (tmp_path / "process" / f"step={step}.ckpt" / "meta.pt").is_file()


def save_each_step(folder: Path) -> None:
    fit("dcp_fsdp2", devices=2, steps=3, callbacks=[every_step(folder)])


def save_with_storage_options(folder: Path) -> bool:
    runner = trainer("dcp_async", devices=1, steps=2)
    runner.fit(Regression(), Ticks(10))
    runner.save_checkpoint(folder / "a", storage_options={"sync_files": False, "thread_count": 1})
    with pytest.raises(ValueError, match="unknown option.*threads. Valid names: .*thread_count"):
        runner.save_checkpoint(folder / "b", storage_options={"threads": 1})
    with pytest.raises(TypeError, match="must be a mapping"):
        runner.save_checkpoint(folder / "b", storage_options="fast")
    return is_committed(folder / "a")


def test_storage_options_of_one_save_are_the_same_options(tmp_path: Path) -> None:
    assert run_ranks(1, save_with_storage_options, tmp_path) == [True]


# -- LightningCLI ----------------------------------------------------------------------------------------------------

PROGRAM = """
    import json, logging, warnings
    warnings.filterwarnings("ignore", module="lightning")
    import dcp_plugins.lightning
    from lightning.pytorch.cli import LightningCLI
    from lightning.pytorch.demos.boring_classes import BoringModel

    # One process, so that neither a launcher nor ports are needed.
    cli = LightningCLI(BoringModel, save_config_callback=None)
    strategy = cli.trainer.strategy
    options = strategy.checkpoint_io.options
    print(json.dumps([type(strategy).__name__, strategy._asynchronous, options.thread_count, options.sync_files]))
"""

CONFIG = """
    trainer:
      accelerator: cpu
      devices: 1
      max_steps: 2
      logger: false
      enable_progress_bar: false
      enable_model_summary: false
      limit_val_batches: 0
      strategy:
        class_path: dcp_plugins.lightning.DCPFSDP2Strategy
        init_args: {asynchronous: thread, thread_count: 2, sync_files: false, data_parallel_size: 1}
      callbacks:
        - class_path: lightning.pytorch.callbacks.ModelCheckpoint
          init_args: {dirpath: checkpoints, filename: "{step}", every_n_train_steps: 2}
"""


def test_lightning_cli_sets_the_options_from_a_file_and_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(textwrap.dedent(PROGRAM))
    (tmp_path / "config.yaml").write_text(textwrap.dedent(CONFIG))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return run_program(tmp_path / "train.py", "fit", "--config", "config.yaml", *arguments, folder=tmp_path)

    done = run("--trainer.strategy.init_args.thread_count=3")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == ["DCPFSDP2Strategy", "thread", 3, False]
    assert is_committed(tmp_path / "checkpoints" / "step=2.ckpt")
    refused = run(
        "--trainer.strategy=dcp_plugins.lightning.DCPDDPStrategy",
        "--trainer.strategy.init_args.find_unused_parameters=true",  # an option of Lightning's own
        "--trainer.strategy.init_args.asynchronous=threads",
    )
    assert refused.returncode != 0
    assert "asynchronous" in refused.stderr
    assert "find_unused_parameters" not in refused.stderr
