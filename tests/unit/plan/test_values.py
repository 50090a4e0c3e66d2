"""Non-tensor values: the bytes are torch's, however often, and damage is told from what is refused as unsafe."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch

import dcp_plugins as dcp
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


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        1,
        1.0,
        0.0,
        -0.0,
        math.inf,
        2**70,
        3 + 4j,
        "text",
        b"bytes",
        (0.9, 0.999),
        (1, (2.5, "x")),
        "x" * 5000,
    ],
    ids=lambda value: repr(value)[:20],
)
def test_each_time_the_bytes_are_torchs_and_the_value_is_of_its_own_type(value: Any) -> None:
    expected = io.BytesIO()
    torch.save(value, expected)
    for _ in range(2):
        stream = dump_value(value)
        assert stream.getvalue() == expected.getvalue()
        loaded = load_value("x", io.BytesIO(stream.getvalue()), weights_only=True)
        assert (type(loaded), repr(loaded)) == (type(value), repr(value))


def test_a_program_that_replaces_torch_save_leaves_no_trace_in_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "save", lambda *args, **options: None)
    assert dump_value(0.4821).getvalue()
    monkeypatch.undo()
    assert load_value("x", io.BytesIO(dump_value(0.4821).getvalue()), weights_only=True) == 0.4821


def test_values_that_can_change_are_made_anew_each_time() -> None:
    for value in ([1, 2], {"a": 1}, ([1],), (bytearray(b"a"),)):
        content = dump_value(value).getvalue()
        first, second = (load_value("x", io.BytesIO(content), weights_only=True) for _ in range(2))
        assert first == second == value
        assert first is not second


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_flipped_bit_in_one_of_many_equal_values_is_found(tmp_path: Any) -> None:
    state = {f"group.{at}": 0.9 for at in range(5)}
    dcp.save(state, checkpoint_id=tmp_path)
    (file,) = tmp_path.glob("*.distcp")
    content = bytearray(file.read_bytes())
    at = content.rindex(b"\x80\x02G")
    content[at + 5] ^= 1
    file.write_bytes(content)
    loaded = {f"group.{at}": 0.0 for at in range(5)}
    with pytest.raises(dcp.CheckpointException, match="checksum|CRC"):
        dcp.load(loaded, checkpoint_id=tmp_path)
