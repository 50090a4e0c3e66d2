"""Symbolic links between checkpoints, such as ``last.ckpt``: switched in one step, from one checkpoint to another."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from dcp_plugins.format.names import METADATA_NAME

__all__ = ["lead_away", "switch_link"]


def switch_link(link: Path, target: Path) -> None:
    """Make ``link`` a link to ``target``, in one step if it is a link already; a checkpoint of its name is deleted."""
    if link.is_dir() and not link.is_symlink():
        (link / METADATA_NAME).unlink(missing_ok=True)
        shutil.rmtree(link)
    fresh = link.with_name(f".{link.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(os.path.relpath(target, link.parent))
    fresh.replace(link)


def lead_away(old: Path, new: Path) -> None:
    """Switch the links beside ``old`` that lead to it to ``new``: ``old`` is about to be deleted."""
    for entry in old.parent.iterdir():
        if entry.is_symlink() and entry.resolve() == old.resolve() != new.resolve():
            switch_link(entry, new)
