"""What the strategies of the Trainer and those of Fabric have in common: a `DCPCheckpointIO`, and its options.

The class here is mixed in before a strategy of Lightning's. `every_rank.py` builds on this for the Trainer,
`fabric/checkpoints.py` for Fabric.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

from dcp_plugins.errors import listing
from dcp_plugins.lightning.checkpoint_io import DCPCheckpointIO
from dcp_plugins.lightning.layout import ModelKey
from dcp_plugins.manager import is_committed
from dcp_plugins.manager.options import Asynchronous
from dcp_plugins.storage.local import make_directory

__all__ = ["SavesThroughDCP", "instead_of", "make_room"]

_Answer = TypeVar("_Answer")


class SavesThroughDCP:
    """Gives a strategy a `DCPCheckpointIO`, made by the strategy's options unless it is given as a plugin.

    Args:
        args: As for the strategy.
        asynchronous: Save in the background: "thread", "process", or True for what the plugin says ("thread", if it
            says nothing). False and "off" save in the foreground; so does None unless the plugin says otherwise.
        thread_count: As in `DCPCheckpointIO`.
        sync_files: As in `DCPCheckpointIO`.
        overlap_staging: As in `DCPCheckpointIO`.
        options: As for the strategy.

    Raises:
        ValueError: Two options contradict each other, or an option is given both here and with a plugin; names them.
    """

    _single_process = False
    _stock_model_key: ModelKey = "state_dict"

    _checkpoint_io: CheckpointIO | None
    broadcast: Callable[..., Any]
    is_global_zero: bool

    def __init__(
        self,
        *args: Any,
        asynchronous: bool | Asynchronous | None = None,
        thread_count: int | None = None,
        sync_files: bool | None = None,
        overlap_staging: bool | None = None,
        **options: Any,
    ) -> None:
        chosen = {"thread_count": thread_count, "sync_files": sync_files, "overlap_staging": overlap_staging}
        self._io_options = {name: value for name, value in chosen.items() if value is not None}
        self._own_io: DCPCheckpointIO | None = None
        self.asynchronous = asynchronous
        if overlap_staging is not None and asynchronous in (None, False, "off"):
            raise ValueError(
                f"overlap_staging={overlap_staging} is about saves in the background, of which"
                f" asynchronous={asynchronous!r} has none. Set asynchronous=True, or leave overlap_staging out."
            )
        DCPCheckpointIO(**self._io_options_of(asynchronous))  # refuses impossible values, here and now
        super().__init__(*args, **options)

    def _io_options_of(self, asynchronous: bool | Asynchronous | None) -> dict[str, Any]:
        if isinstance(asynchronous, bool):
            asynchronous = "thread" if asynchronous else "off"
        return {**self._io_options, "asynchronous": asynchronous}

    def _io(self) -> DCPCheckpointIO:
        """Return the plugin through which this strategy saves and loads: what ``checkpoint_io`` is."""
        if self._checkpoint_io is None:
            self._own_io = DCPCheckpointIO(**self._io_options_of(self.asynchronous))
            self._take(self._own_io)
        assert isinstance(self._checkpoint_io, DCPCheckpointIO)
        return self._checkpoint_io

    def _accept_io(self, plugin: CheckpointIO) -> None:
        """Take the plugin that ``checkpoint_io`` is set to."""
        name = type(self).__name__
        if not isinstance(plugin, DCPCheckpointIO):
            raise TypeError(
                f"{name} needs a DCPCheckpointIO, got {type(plugin).__name__}: other plugins write on"
                " rank 0 only. Leave the plugin out, or use one of Lightning's own strategies with it."
            )
        if self._io_options and plugin is not self._own_io:
            raise ValueError(
                f"{listing(self._io_options)} given to {name}, but a DCPCheckpointIO is there, too, with options of its"
                " own. Give all of them to one of the two."
            )
        kind = self._io_options_of(self.asynchronous)["asynchronous"]
        agrees = plugin.asynchronous in (None, kind) or kind is None
        if not agrees and not (self.asynchronous is True and plugin.asynchronous != "off"):
            raise ValueError(
                f"asynchronous={self.asynchronous!r} of {name} contradicts asynchronous={plugin.asynchronous!r} of the"
                " DCPCheckpointIO. Leave one of the two out."
            )
        self._take(plugin)

    def _take(self, plugin: DCPCheckpointIO) -> None:
        plugin.single_process = self._single_process
        plugin.stock_model_key = self._stock_model_key
        self._checkpoint_io = plugin

    @property
    def _asynchronous(self) -> Asynchronous:
        """Where saves are written, all said and done."""
        plugin_says = self._io().asynchronous
        if self.asynchronous is True:
            return plugin_says or "thread"
        if self.asynchronous is None:
            return plugin_says or "off"
        return self.asynchronous or "off"

    def _decide_on_rank_zero(self, decide: Callable[[], _Answer]) -> _Answer:
        """Run ``decide`` on rank 0 and return its answer, or raise its error, on every rank."""
        outcome: tuple[bool, Any] = (True, None)
        if self.is_global_zero:
            try:
                outcome = (True, decide())
            except Exception as exc:  # whatever it is, the other ranks are waiting to hear of it
                outcome = (False, exc)
        succeeded, value = self.broadcast(outcome)
        if not succeeded:
            raise value
        answer: _Answer = value
        return answer


def make_room(path: Path, *, sync: bool) -> tuple[Path, Path | None]:
    """See to it that ``path`` can be a directory of its own. Runs on rank 0, before any rank writes.

    Returns:
        The path, and where an ordinary checkpoint file was put that had its name: to be deleted after the commit.
    """
    if path.is_symlink():
        # It leads to another checkpoint, which a save through it would overwrite.
        path.unlink()
    aside = _aside(path)
    if path.is_file():
        path.replace(aside)
    # Names for further checkpoints are chosen by what is there, perhaps before a save in the background writes a file.
    make_directory(path, sync=sync)
    # It may be there from a save that was killed or has failed.
    return path, aside if aside.is_file() else None


def instead_of(path: Path) -> Path | None:
    """Return the ordinary checkpoint file that a save into ``path`` was to replace, if the save was never committed."""
    aside = _aside(path)
    return aside if aside.is_file() and not is_committed(path) else None


def _aside(path: Path) -> Path:
    return path.with_name(f"{path.name}.replaced")
