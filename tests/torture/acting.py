"""A process that harms itself in the midst of what it does: at a chosen call of this package's functions."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import dcp_plugins

__all__ = ["Acting", "Action", "Hit"]

Action = Literal["none", "kill", "stop", "sleep", "raise", "interrupt"]

_PACKAGE = str(Path(dcp_plugins.__file__).parent)


class Hit(Exception):
    """What ``raise`` raises."""


class Acting:
    """Counts the calls of functions of dcp_plugins in all threads, and acts at one of them, while it is entered.

    Args:
        action: ``kill`` and ``stop`` send this process the signal, ``sleep`` holds up the thread, ``raise`` and
            ``interrupt`` raise in the function that is called.
        nth: The call, the first being 0.
        note: A file that is made before the action, with this process's id in it.
        seconds: How long ``sleep`` sleeps.
    """

    def __init__(self, action: Action, nth: int, note: str | None = None, seconds: float = 0.0) -> None:
        self.action, self.nth, self.note, self.seconds = action, nth, note, seconds
        self.count = 0
        self.where = ""
        self._lock = threading.Lock()

    def __enter__(self) -> Acting:
        threading.setprofile(self._called)
        sys.setprofile(self._called)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def _called(self, frame: FrameType, event: str, argument: Any) -> None:
        if event != "call" or not frame.f_code.co_filename.startswith(_PACKAGE):
            return
        with self._lock:
            number, self.count = self.count, self.count + 1
        if number == self.nth:
            self.where = f"{frame.f_code.co_filename[len(_PACKAGE) + 1 :]}:{frame.f_code.co_name}"
            self._act()

    def _act(self) -> None:
        if self.note is not None:
            Path(f"{self.note}.new").write_text(f"{os.getpid()} {self.where}")
            Path(f"{self.note}.new").rename(self.note)
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.action == "sleep":
            time.sleep(self.seconds)
        elif self.action == "raise":
            raise Hit(f"hit in {self.where}")
        elif self.action == "interrupt":
            raise KeyboardInterrupt(f"hit in {self.where}")
