"""Why a pickle of values cannot be decoded. ``value_container`` turns these into the errors that users see."""

from __future__ import annotations

__all__ = ["DecodingError", "RefusedError"]


class DecodingError(ValueError):
    """The pickle, or a field in it, is not one that can have been saved."""


class RefusedError(Exception):
    """The pickle needs something that is neither listed nor trusted."""

    def __init__(self, name: str, action: str = "") -> None:
        super().__init__(f"{name} {action}".rstrip())
        self.name = name
        self.action = action
        """Said of the name where admitting it is not enough; empty where it is."""
