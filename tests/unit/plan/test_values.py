"""Non-tensor values: damage is told from what is refused as unsafe."""

from __future__ import annotations

import io

import pytest

from dcp_plugins.errors import CorruptCheckpointError, UnsafeCheckpointError
from dcp_plugins.plan.values import dump_value, load_value


class Own:
    """A class that no checkpoint may bring along."""


@pytest.mark.parametrize("weights_only", [True, False])
def test_bytes_that_are_no_saved_value_are_damage(weights_only: bool) -> None:
    good = dump_value({"a": 1}).getvalue()
    for head in (b"", b"\xaf\xb4\xfc\xfb", b"\x00\x00\x00\x00"):
        with pytest.raises(CorruptCheckpointError, match="x: the saved value cannot be read: expected") as caught:
            load_value("x", io.BytesIO(head + good[4:] if head else b""), weights_only=weights_only)
        assert not isinstance(caught.value, UnsafeCheckpointError)
    assert load_value("x", io.BytesIO(good), weights_only=weights_only) == {"a": 1}


def test_a_class_that_is_not_admitted_is_unsafe() -> None:
    with pytest.raises(UnsafeCheckpointError, match="x: .* not admitted"):
        load_value("x", io.BytesIO(dump_value(Own()).getvalue()), weights_only=True)
