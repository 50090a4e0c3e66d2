"""What the user asked of a benchmark run, in a form that crosses process boundaries."""

from __future__ import annotations

import dataclasses
from typing import Any

__all__ = ["Options"]


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """The settings every case shares."""

    num_rounds: int
    """Timed rounds after the warm-up round; each gives one sample per side and measure."""

    scale: float
    """Factor on the bytes of every case; 1 is the size that the targets are stated for."""

    sync: bool
    """Whether every side makes its files durable (``fsync``) inside the timed part of a save."""

    num_threads: int | None
    """Writer threads of ours, and of the limit; ``None`` is our default."""

    num_stock_threads: int | None
    """Writer threads of stock torch; ``None`` is its default."""

    num_ranks: int
    """Processes of the ``fsdp2`` case."""

    device: str = "cpu"
    """Where the state of the ``async`` case is, and its training loop computes."""

    collect_garbage: bool = True
    """Whether Python's garbage collector stays on in the timed parts, on every side, as it is in a training loop."""

    use_group: bool = True
    """Whether the cases of one process run in a process group of one rank, as under a launcher."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Options:
        return cls(**values)
