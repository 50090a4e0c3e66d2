"""Symbolic links between checkpoints, such as ``last.ckpt``: switched in one step, from one checkpoint to another."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from dcp_plugins.format.names import METADATA_NAME

__all__ = ["lead_away", "links_to", "switch_link"]


def switch_link(link: Path, target: Path) -> None:
    """Make ``link`` a link to ``target``, in one step if it is a link already; a checkpoint of its name is deleted."""
    if link.is_dir() and not link.is_symlink():
        (link / METADATA_NAME).unlink(missing_ok=True)
        shutil.rmtree(link)
    fresh = link.with_name(f".{link.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(os.path.relpath(target, link.parent))
    fresh.replace(link)


def links_to(path: Path) -> list[Path]:
    """Return the links beside a checkpoint that lead to it; none for a path that is a link itself."""
    if path.is_symlink() or not path.is_dir():
        return []
    return [entry for entry in path.parent.iterdir() if entry.is_symlink() and entry.resolve() == path.resolve()]


def lead_away(old: Path, new: Path) -> None:
    """Switch the links beside ``old`` that lead to it to ``new``: ``old`` is about to be deleted."""
    if old.resolve() != new.resolve():
        for link in links_to(old):
            switch_link(link, new)
