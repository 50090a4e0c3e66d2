"""PyTorch's two checkpoint recipes run here after a find-and-replace of the package's name."""

from __future__ import annotations

import runpy
import warnings
from pathlib import Path

import pytest
import torch.distributed as dist

from dcp_plugins.errors import UnreadValuesWarning
from dcp_plugins.testing.ranks import run_ranks

HERE = Path(__file__).resolve().parent
STOCK = "torch.distributed.checkpoint"


def recipe(name: str, prefix: str, folder: Path) -> Path:
    """Write the recipe with the checkpoint package's name replaced, and nothing else; return the program."""
    source = (HERE / f"{name}.py").read_text().replace(STOCK, prefix)
    assert f"import {prefix} as dcp" in source
    program = folder / f"{name}.py"
    program.write_text(source)
    return program


def run_on_rank(program: Path, function: str, folder: Path) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    # Recipes make their process group themselves. This one must not vanish while a peer is still connecting to it.
    dist.barrier()
    dist.destroy_process_group()
    with warnings.catch_warnings():
        # Stock torch warns of its own deprecated calls.
        warnings.simplefilter("ignore")
        runpy.run_path(str(program))[function](rank, world_size, str(folder))


def run_getting_started(program: Path, folder: Path) -> None:
    run_ranks(2, run_on_rank, program, "save_example", folder)
    run_ranks(2, run_on_rank, program, "load_example", folder)
    # The number of processes may differ between saving and loading.
    run_ranks(1, run_on_rank, program, "load_example", folder)
    runpy.run_path(str(program))["plain_load_example"](str(folder))


def run_asynchronous_saving(program: Path, folder: Path) -> None:
    run_ranks(2, run_on_rank, program, "async_save_example", folder)
    run_ranks(2, run_on_rank, program, "cached_staging_example", folder)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_getting_started_runs_with_only_the_prefix_changed(tmp_path: Path) -> None:
    # Its plain load takes the model out of `app` and leaves the optimizer there.
    with pytest.warns(UnreadValuesWarning, match=r"app\.optim\."):
        run_getting_started(recipe("getting_started", "dcp_plugins", tmp_path), tmp_path)


def test_asynchronous_saving_runs_with_only_the_prefix_changed(tmp_path: Path) -> None:
    run_asynchronous_saving(recipe("asynchronous_saving", "dcp_plugins", tmp_path), tmp_path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_getting_started_is_a_recipe_that_stock_torch_runs(tmp_path: Path) -> None:
    run_getting_started(recipe("getting_started", STOCK, tmp_path), tmp_path)


def test_asynchronous_saving_is_a_recipe_that_stock_torch_runs(tmp_path: Path) -> None:
    run_asynchronous_saving(recipe("asynchronous_saving", STOCK, tmp_path), tmp_path)
