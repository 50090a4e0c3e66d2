"""Blank copies and bit-for-bit comparison."""

from __future__ import annotations

import pytest
import torch

from dcp_plugins.cli.bench.cases import CASE_NAMES, STATE_CASES, estimate_bytes
from dcp_plugins.cli.bench.state import (
    VerificationError,
    blank_copy,
    check_loaded,
    differences,
    erase,
    leaves,
    local_tensors,
)


def example():
    return {"model": {"w": torch.ones(3, 5), "b": torch.ones(3, dtype=torch.bfloat16)}, "steps": [7, 0.5], "name": "x"}


def test_a_blank_copy_has_the_same_structure_and_none_of_the_values():
    state = example()
    blank = blank_copy(state)
    assert [name for name, _ in leaves(blank)] == [name for name, _ in leaves(state)]
    assert not any(tensor.any() for tensor in local_tensors(blank))
    assert blank["steps"] == [0, 0.0]
    assert blank["name"] == ""
    assert len(differences(state, blank)) == 5


def test_erasing_a_loaded_target_makes_it_blank_again():
    state = example()
    target = blank_copy(state)
    target["model"]["w"].copy_(state["model"]["w"])
    target["steps"] = [7, 0.5]
    erase(target)
    assert differences(blank_copy(state), target) == []


@pytest.mark.parametrize(
    ("expected", "loaded"),
    [
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64)),
        (torch.ones(2, 3), torch.ones(3, 2)),
        (torch.ones(3, dtype=torch.bool), torch.tensor([True, True, False])),
        (1, 1.0),
        (1, torch.tensor(1)),
        ("a", "b"),
    ],
)
def test_any_difference_in_bits_dtype_shape_or_type_is_seen(expected, loaded):
    assert differences({"key": expected}, {"key": loaded}) == ["key"]


def test_equal_bits_are_equal_also_for_nan_views_and_odd_sizes():
    base = torch.tensor([1.0, float("nan"), 3.0, 4.0], dtype=torch.bfloat16)
    state = {"a": base[1:], "b": base.reshape(2, 2).t(), "empty": torch.empty(0), "scalar": torch.tensor(2.0)}
    assert differences(state, {name: tensor.clone() for name, tensor in state.items()}) == []


def test_missing_and_extra_names_are_differences():
    assert differences({"a": 1, "b": 2}, {"b": 2, "c": 3}) == ["a", "c"]


def test_the_error_names_who_saved_and_what_is_wrong():
    with pytest.raises(VerificationError, match="saved by ours, loaded by stock: 1 .* saved: a"):
        check_loaded({"a": 1}, {"a": 2}, "saved by ours, loaded by stock")


@pytest.mark.parametrize("case", STATE_CASES)
def test_a_case_gives_the_same_values_every_time_and_about_its_share_of_bytes(case):
    state = STATE_CASES[case].build(0.002)
    assert differences(state, STATE_CASES[case].build(0.002)) == []
    num_bytes = sum(tensor.nbytes for tensor in local_tensors(state))
    assert 0.4 * estimate_bytes(case, 0.002) < num_bytes < 2.5 * estimate_bytes(case, 0.002)


def test_the_full_sizes_are_those_of_the_targets():
    sizes = {name: estimate_bytes(name, 1.0) / 1e9 for name in CASE_NAMES}
    assert sizes["big"] == pytest.approx(1.216)
    assert sizes["small"] == pytest.approx(0.0819, rel=0.01)
    assert sizes["llm"] == pytest.approx(1.363, rel=0.001)
    assert sizes["fsdp2"] == pytest.approx(1.2, rel=0.01)
    assert len(local_tensors(STATE_CASES["llm"].build(0.001))) == 300
