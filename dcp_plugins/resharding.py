"""``torch.distributed.checkpoint.resharding`` under this package's name; torch's module has no public name either."""

from __future__ import annotations

__all__: list[str] = []
