"""Any nesting of listed values comes back equal, as stock torch reads it, and through a checkpoint."""

from __future__ import annotations

import collections
import contextlib
import datetime
import decimal
import fractions
import io
import pathlib
import types
import uuid
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_plugins.errors import CorruptCheckpointError
from dcp_plugins.format.value_container import decode_value
from tests.unit.format.value_samples import same

numbers = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary())
keys = st.one_of(numbers, st.tuples(numbers, numbers), st.frozensets(st.integers()))
listed = st.one_of(
    numbers,
    st.complex_numbers(allow_nan=False),
    st.builds(bytearray, st.binary()),
    st.fractions().map(fractions.Fraction),
    st.decimals(allow_nan=False).map(decimal.Decimal),
    st.uuids().map(lambda value: uuid.UUID(int=value.int)),
    st.datetimes(timezones=st.just(datetime.timezone.utc)),
    st.timedeltas(),
    st.builds(range, st.integers(-9, 9), st.integers(-9, 9), st.integers(1, 9)),
    st.lists(st.text(alphabet="ab.", min_size=1), min_size=1).map(lambda parts: pathlib.PurePosixPath(*parts)),
    st.lists(st.integers(-100, 100)).map(lambda values: np.array(values, dtype=np.int16)),
    st.lists(st.text(alphabet="aü")).map(lambda values: np.array(values, dtype="U5")),
    st.lists(st.floats(width=32, allow_nan=False)).map(lambda values: torch.tensor(values, dtype=torch.float32)),
    st.sets(keys),
)
values = st.recursive(
    listed,
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner).map(tuple),
        st.dictionaries(keys, inner),
        st.dictionaries(keys, inner).map(collections.OrderedDict),
        st.dictionaries(keys, inner).map(lambda value: collections.defaultdict(list, value)),
        st.lists(inner).map(lambda value: collections.deque(value, maxlen=50)),
        st.dictionaries(st.sampled_from("abc"), inner).map(lambda value: types.SimpleNamespace(**value)),
        inner.map(lambda value: [value, value]),
    ),
    max_leaves=12,
)


@given(values, st.sampled_from([2, 4]))
@settings(max_examples=50, deadline=None)
def test_any_nesting_of_listed_values_is_decoded_as_stock_torch_does(value: Any, protocol: int) -> None:
    stream = io.BytesIO()
    torch.save(value, stream, pickle_protocol=protocol)
    decoded = decode_value(stream.getvalue(), "x")
    stream.seek(0)
    assert same(decoded, torch.load(stream, weights_only=False))


@given(st.binary(max_size=300), st.integers(0, 299), st.integers(0, 255))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_a_value_or_damage(noise: bytes, position: int, byte: int) -> None:
    stream = io.BytesIO()
    torch.save({"a": [1, collections.deque([2.5, "x"]), np.arange(2)], (1, 2): {3}}, stream)
    good = bytearray(stream.getvalue())
    start = good.index(b"\x80\x02")
    good[start + position % 400] = byte
    for data in (b"\x80\x02" + noise, b"\x80\x04" + noise + b".", bytes(good)):
        with contextlib.suppress(CorruptCheckpointError):
            decode_value(data, "x")
