"""Helpers for testing code that checkpoints: a rank harness, fault injection, a contract suite for storages.

Each is a module of its own; no floor of the package imports any of them.
"""

from __future__ import annotations

__all__: list[str] = []
