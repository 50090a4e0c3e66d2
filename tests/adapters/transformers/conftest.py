"""Without Transformers these tests are skipped."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

# Nothing here asks the hub for anything; what would is to fail at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
