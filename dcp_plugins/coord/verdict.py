"""The last exchange of a call: every living rank returns, or every living rank raises.

A rank that dies, or stops, in an exchange may cut off some ranks from the others, and the transport serves the others
all the same. In an exchange that another one follows, the next exchange fails for them too. After the last exchange
they would return, and the ranks that were cut off would raise. So each rank first says in the store of the process
group what it has found: that the call is complete, or that it has lost contact. The first word counts for all.
"""

from __future__ import annotations

import contextlib
import time
from typing import Literal

import torch.distributed as dist

from dcp_plugins.coord.per_group import PerGroup, store_of

__all__ = ["Verdicts", "Word", "verdicts_of"]

Word = Literal["complete", "lost"]

_KEY = "verdict"
# A rank that asks the store earlier than this would delay each small save, and find nothing.
_ASK_AFTER_SECONDS = 1.0


class Verdicts:
    """The words of this rank and the others on the last exchanges in one process group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._store = store_of(group)
        self._number = 0
        self._began = 0.0
        # The last word under each key. There are two keys, used in turn: a rank may read the verdict of an exchange
        # when the others are already in the next one.
        self._seen: dict[str, str] = {}

    def begin(self) -> None:
        """Count a last exchange; all ranks call this before it."""
        self._number += 1
        self._began = time.monotonic()

    def say(self, word: Word) -> Word:
        """Say what this rank has found, unless that was said before, by any rank; return the word that counts."""
        key = self._key
        # If the store does not answer, each rank is left to its own word.
        with contextlib.suppress(RuntimeError, OSError):
            while self._store is not None and self._heard is None:
                replaced = self._seen.get(key, "")
                self._seen[key] = self._store.compare_set(key, replaced, f"{self._number} {word}").decode()
                if self._seen[key] == replaced:
                    break  # The store keeps nothing.
        return self._heard or word

    def have_others_given_up(self) -> bool:
        """Whether a rank has said that it has lost contact, as far as that can be known without a delay."""
        if self._store is None or time.monotonic() - self._began < _ASK_AFTER_SECONDS:
            return False
        key = self._key
        with contextlib.suppress(RuntimeError, OSError):
            if self._store.check([key]):
                self._seen[key] = self._store.get(key).decode()
        return self._heard == "lost"

    @property
    def _key(self) -> str:
        return f"{_KEY}/{self._number % 2}"

    @property
    def _heard(self) -> Word | None:
        """The word on this exchange, as far as this rank knows."""
        number, _, word = self._seen.get(self._key, "").partition(" ")
        if number != str(self._number):
            return None
        return "lost" if word == "lost" else "complete"


def verdicts_of(group: dist.ProcessGroup | None) -> Verdicts:
    """Return the verdicts in a group, None for the default group."""
    return _verdicts.of(group)


_verdicts = PerGroup(Verdicts)
