"""What must hold after any fault."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch

import dcp_plugins as dcp
from tests.interop.values import assert_same, blank, patterned


def state_of(seed: int) -> dict[str, Any]:
    """Return a small state whose every value depends on ``seed``."""
    return {
        "model": {
            "weight": patterned(torch.float32, 70, 33, seed=seed),
            "bias": patterned(torch.bfloat16, 33, seed=seed),
            "steps": torch.tensor(seed),
        },
        "epoch": seed,
        "note": f"seed {seed}",
    }


def load_state(folder: Path | str, **options: Any) -> dict[str, Any]:
    target: dict[str, Any] = blank(state_of(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(target, checkpoint_id=folder, no_dist=True, **options)
    return target


def save_state(folder: Path | str, seed: int, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state_of(seed), checkpoint_id=folder, no_dist=True, **options)


def assert_holds(folder: Path | str, seed: int) -> None:
    """Check that the committed checkpoint is, bit for bit, the one of ``seed``."""
    assert_same(load_state(folder), state_of(seed))


def seed_held(folder: Path | str) -> int:
    """Return the seed of the checkpoint that is committed, having checked all its bits."""
    found = load_state(folder)
    assert_same(found, state_of(found["epoch"]))
    return int(found["epoch"])


def assert_no_litter(folder: Path | str) -> None:
    """Check that the directory holds metadata and the files that it names, and nothing else."""
    metadata = dcp.FileSystemReader(folder).read_metadata()
    named = {info.relative_path for info in metadata.storage_data.values()}
    assert set(os.listdir(folder)) == named | {".metadata"}


def assert_recovers(folder: Path | str, seed: int = 99) -> None:
    """Check that the next save succeeds and reclaims all that the fault left behind."""
    save_state(folder, seed)
    assert_holds(folder, seed)
    assert_no_litter(folder)
