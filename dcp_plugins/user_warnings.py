"""Warnings that point at the line of the user's program which led to them."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from types import FrameType

__all__ = ["warn_user"]

_PACKAGE = os.path.join(Path(__file__).parent, "")

# These modules call this package, or run its functions, on behalf of the user's line further out.
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

    A constant ``stacklevel`` is right for one depth of calls only: a warning that is reached on several paths would
    point into this package, and Python would show it once for all callers.
    """
    frame = _user_frame(sys._getframe(1))
    warnings.warn_explicit(
        message,
        category,
        filename=frame.f_code.co_filename,
        lineno=frame.f_lineno,
        module=frame.f_globals.get("__name__") or "<unknown>",
        # Python's filters remember here which warnings this module has shown.
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
        module_globals=frame.f_globals,
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
    # A thread of the background has no line of the user's beneath it.
    return outside or outermost
