"""Importing this module last lets a process, and those forked from it, never look at what was imported before again.

A full collection walks every object: half a second with torch and a framework loaded, and in a forked child each object
that is looked at costs a copy of its page. Nothing that was imported is ever garbage.
"""

from __future__ import annotations

import gc

__all__: list[str] = []

gc.collect()
gc.freeze()
