"""Confidence intervals."""

from __future__ import annotations

import math

Z_95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


def wilson(correct: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (95 % by default), of use also at 0 and 1.

    It takes the recordings as independent: it does not cover how results vary with the choice of speakers.

    Args:
        correct: number of successes.
        total: number of trials.
        z: normal quantile.

    Returns:
        lower and upper bound, within [0, 1].

    Raises:
        ValueError: not 0 <= correct <= total, or no trials.
    """
    if total <= 0 or not 0 <= correct <= total:
        raise ValueError(f"correct {correct}, total {total}: expected 0 <= correct <= total and total above 0")
    rate, square = correct / total, z * z / total
    centre = (rate + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(rate * (1 - rate) / total + square / (4 * total))
    return max(0.0, centre - half), min(1.0, centre + half)
