"""A run resumes exactly, whatever its optimizer keeps and whenever it has begun to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.resume.optimizers import OPTIMIZERS
from tests.resume.surfaces import SURFACES, uninterrupted


@pytest.mark.parametrize("surface", SURFACES, ids=lambda surface: surface.__name__)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_resumed_run_ends_with_the_parameters_of_one_that_was_not_interrupted(
    tmp_path: Path, surface: Callable[..., Any], kind: str
) -> None:
    make = OPTIMIZERS[kind]
    expected = dict(uninterrupted(make).named_parameters())
    found = {name.removeprefix("module."): value for name, value in surface(tmp_path, make).named_parameters()}
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
