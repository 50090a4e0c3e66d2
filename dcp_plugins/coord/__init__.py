"""Where ranks talk: gather, scatter, agree, each with every rank's failure in it."""

from __future__ import annotations

from dcp_plugins.coord.arrivals import naming_absent
from dcp_plugins.coord.group import Ranks
from dcp_plugins.coord.outcomes import Sealed, portable, stack_of

__all__ = ["Ranks", "Sealed", "naming_absent", "portable", "stack_of"]
