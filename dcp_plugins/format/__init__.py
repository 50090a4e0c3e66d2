"""What bytes mean: containers, ``.metadata``, file names. Nothing here opens a file."""

from __future__ import annotations

__all__: list[str] = []
