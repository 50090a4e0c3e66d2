"""Warnings that point at the user's line, not at a line of this package."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from types import FrameType

__all__ = ["warn_user"]

_PACKAGE = os.path.join(Path(__file__).parent, "")

# Modules that call this package for the user: the user's line is further out.
_BETWEEN = frozenset(
    {
        "accelerate",
        "concurrent",
        "contextlib",
        "functools",
        "lightning",
        "lightning_fabric",
        "pytorch_lightning",
        "threading",
        "torch",
        "transformers",
    }
)


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning at the innermost line outside of this package, of torch and of the frameworks.

    A constant ``stacklevel`` is right for one depth of calls only. On other paths the warning would point into this
    package, and Python would show it once for all callers.
    """
    frame = _user_frame(sys._getframe(1))
    warnings.warn_explicit(
        message,
        category,
        filename=frame.f_code.co_filename,
        lineno=frame.f_lineno,
        module=frame.f_globals.get("__name__") or "<unknown>",
        # Python's filters keep in this dict which warnings the module has shown.
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _user_frame(innermost: FrameType) -> FrameType:
    outside: FrameType | None = None
    outermost = innermost
    frame: FrameType | None = innermost
    while frame is not None:
        outermost = frame
        if not frame.f_code.co_filename.startswith(_PACKAGE):
            if str(frame.f_globals.get("__name__")).partition(".")[0] not in _BETWEEN:
                return frame
            outside = outside or frame
        frame = frame.f_back
    # A background thread has no line of the user's on its stack.
    return outside or outermost
