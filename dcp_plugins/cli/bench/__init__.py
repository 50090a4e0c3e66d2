"""``dcp-plugins bench``: this package against stock torch and against the machine's limit, on the user's storage.

``command.py`` is the entry; ``cases.py`` says what is saved, ``measure.py`` how it is timed, ``limits.py`` what the
machine can do at best, ``memory.py``, ``fsdp2.py``, ``state_dict.py`` and ``async_saves.py`` are the cases that need
processes of their own, and ``targets.py`` and ``async_targets.py`` the speeds that the project promises.
"""

from __future__ import annotations

from dcp_plugins.cli.bench.command import bench

__all__ = ["bench"]
