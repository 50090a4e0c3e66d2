"""Several stories told by one set of ranks: the ranks' checkpoint processes, which take seconds, start once for all."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dcp_plugins.testing.ranks import run_ranks

Story = Callable[..., Any]
"""Called on every rank with a folder of its own and what else was given; asserts, and returns what a test asks for."""


@dataclasses.dataclass(frozen=True)
class Told:
    """What came of the stories; those behind the first that failed are not told."""

    folder: Path
    answers: dict[str, list[Any]]
    failures: dict[str, str]

    def of(self, name: str) -> list[Any]:
        """Return a story's answers, indexed by rank; raise what it failed with."""
        assert name not in self.failures, self.failures[name]
        assert name in self.answers, f"not told, because another failed: {', '.join(self.failures)}"
        return self.answers[name]

    def folder_of(self, name: str) -> Path:
        return self.folder / name


def tell(world_size: int, folder: Path, stories: dict[str, tuple[Any, ...]], **options: Any) -> Told:
    """Run stories one after the other on one set of ranks.

    Args:
        world_size: Number of ranks.
        folder: Gets a folder for each story.
        stories: Name -> function and arguments behind the folder.
        options: Those of ``run_ranks``.
    """
    for name in stories:
        (folder / name).mkdir()
    ranks = run_ranks(world_size, _tell, str(folder), stories, **options)
    answers: dict[str, list[Any]] = {}
    failures: dict[str, str] = {}
    for name in stories:
        found = [rank[name] for rank in ranks if name in rank]
        texts = [f"[rank {number}] {text}" for number, (ok, text) in enumerate(found) if not ok]
        if texts:
            failures[name] = "\n".join(texts)
        elif found:
            answers[name] = [answer for _, answer in found]
    return Told(folder, answers, failures)


def _tell(folder: str, stories: dict[str, Sequence[Any]]) -> dict[str, tuple[bool, Any]]:
    told: dict[str, tuple[bool, Any]] = {}
    everywhere: list[Any] = [None] * dist.get_world_size()
    for name, (story, *arguments) in stories.items():
        try:
            told[name] = (True, story(f"{folder}/{name}", *arguments))
        # Whatever a story fails with is what its test fails with.
        except Exception:
            told[name] = (False, traceback.format_exc())
        dist.all_gather_object(everywhere, told[name][0])
        if not all(everywhere):
            break
    return told
