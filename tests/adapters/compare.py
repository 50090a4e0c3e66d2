"""How far two runs on other numbers of processes may be apart."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def relative_difference(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the norm of the difference of all weights, in norms of those expected.

    Other numbers of processes add gradients in another order. Adam makes a step of its own size of the rounding of a
    gradient that is nearly 0, so single weights may differ by more than rounding.
    """
    difference = sum(float((weights[name] - value).square().sum()) for name, value in expected.items())
    return float((difference / sum(float(value.square().sum()) for value in expected.values())) ** 0.5)
