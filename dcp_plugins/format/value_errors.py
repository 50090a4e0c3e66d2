"""Errors of the decoder of values. ``value_container`` turns these into the errors that users see."""

from __future__ import annotations

__all__ = ["DecodingError", "RefusedError"]


class DecodingError(ValueError):
    """The pickle, or a field in it, is malformed: no save writes it."""


class RefusedError(Exception):
    """The pickle needs a class or function that is neither listed nor trusted."""

    def __init__(self, name: str, action: str = "") -> None:
        super().__init__(f"{name} {action}".rstrip())
        self.name = name
        self.action = action
        """Why declaring the name safe is not enough; empty if it is enough."""
