"""Where ranks talk: gather, scatter, agree, each with every rank's failure in it."""

from __future__ import annotations

from dcp_plugins.coord.group import Ranks, portable, stack_of

__all__ = ["Ranks", "portable", "stack_of"]
