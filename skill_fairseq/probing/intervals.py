"""Confidence intervals of rates, over speakers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Optional

import numpy as np

Z_95 = 1.959963984540054  # 97.5 % quantile of the normal distribution
MIN_SPEAKERS = 3
"""With fewer there is no interval: two speakers say almost nothing about the variance between speakers."""


def student_t(freedom: float) -> float:
    """Two-sided 95 % quantile of Student's t with this many degrees of freedom."""
    from scipy.stats import t

    return float(t.ppf(0.975, freedom))


def wilson(correct: float, total: float, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (95 % by default), which also works at 0 and 1.

    It assumes independent trials; recordings of one speaker are not, see :func:`accuracy_interval`.

    Args:
        correct: number of successes, not necessarily whole.
        total: number of trials, not necessarily whole.
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


def per_speaker(values: np.ndarray, speakers: Sequence[str]) -> np.ndarray:
    """One column per speaker, whose mean is the mean over recordings and whose spread is that of speakers.

    The linearised ratio estimator of a mean over clusters: in a row with mean m, speaker k with n_k recordings of mean
    m_k gets m + n_k / mean(n) * (m_k - m). If all speakers have equally many recordings, that is m_k.

    Args:
        values: (rows, recordings).
        speakers: speaker of each recording.

    Returns:
        (rows, speakers), speakers sorted by name.

    Raises:
        ValueError: there is not one speaker per recording.
    """
    if len(speakers) != values.shape[1]:
        raise ValueError(f"speakers: {len(speakers)} for {values.shape[1]} recordings; give one per recording")
    names, index = np.unique(np.asarray(speakers, dtype=str), return_inverse=True)
    member = np.eye(len(names))[index]  # (recordings, speakers)
    mean = values.mean(1, keepdims=True)
    return mean + (values - mean) @ member * (len(names) / values.shape[1])


def accuracy_interval(right: Sequence[bool], speakers: Sequence[str]) -> Optional[tuple[float, float]]:
    """95 % interval of an accuracy, over speakers.

    Recordings of one speaker are correlated, so they count for less than their number n. This is Wilson's interval for
    the effective number p (1 - p) / var, where var is the variance between speakers (Dean and Pagano 2015), times
    (1.96 / t)^2 for the few degrees of freedom (Korn and Graubard 1998), at most n.

    Args:
        right: whether each test recording was classified correctly.
        speakers: speaker of each.

    Returns:
        lower and upper bound; None with fewer than :data:`MIN_SPEAKERS` speakers.
    """
    values = np.asarray(right, dtype=float)
    means = per_speaker(values[None], speakers)[0]
    number, total, rate = len(means), float(len(values)), float(values.mean())
    if number < MIN_SPEAKERS:
        return None
    variance = float(means.var(ddof=1)) / number
    if variance > 0:
        total = min(total, rate * (1 - rate) / variance * (Z_95 / student_t(number - 1)) ** 2)
    return wilson(rate * total, total)


def why_none(speakers: int) -> str:
    """Why there is no interval over this many speakers; 0: speakers are unknown."""
    known = f"{speakers} speaker{'s' * (speakers != 1)}" if speakers else "speakers unknown"
    return f"{known}, an interval needs {MIN_SPEAKERS} or more"


def show_interval(
    value: float, interval: Optional[Sequence[float]], scale: float = 100, digits: int = 1, signed: bool = False
) -> str:
    """A value and its interval as text, "12.3 [11.0, 13.5]"; only the value without an interval.

    Args:
        value, interval: the value, and its lower and upper bound.
        scale: factor; 100 gives per cent.
        digits: digits after the decimal point.
        signed: write a plus sign too.
    """
    shown, *bounds = (f"{scale * number:{'+' if signed else ''}.{digits}f}" for number in (value, *(interval or ())))
    return f"{shown} [{', '.join(bounds)}]" if bounds else shown
