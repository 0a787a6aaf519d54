"""Confidence intervals of rates, over speakers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Optional

import numpy as np

Z_95 = 1.959963984540054  # 97.5 % quantile of the normal distribution
MIN_SPEAKERS = 3
"""With fewer there is no interval: two speakers say next to nothing about how much speakers differ."""


def student_t(freedom: float) -> float:
    """Two-sided 95 % quantile of Student's t with so many degrees of freedom."""
    from scipy.stats import t

    return float(t.ppf(0.975, freedom))


def wilson(correct: float, total: float, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (95 % by default), of use also at 0 and 1.

    It takes the trials as independent; recordings of one speaker are not, see :func:`accuracy_interval`.

    Args:
        correct: number of successes; need not be whole.
        total: number of trials; need not be whole.
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
    """One column a speaker, whose mean is the mean over recordings and whose spread is that of speakers.

    The linearised ratio estimator of a mean over clusters: of a row with mean m, speaker k, with n_k recordings
    of mean m_k, gets m + n_k / mean(n) * (m_k - m). With equally many recordings each, that is m_k.

    Args:
        values: (rows, recordings).
        speakers: of each recording.

    Returns:
        (rows, speakers), speakers sorted by name.

    Raises:
        ValueError: not one speaker a recording.
    """
    if len(speakers) != values.shape[1]:
        raise ValueError(f"speakers: {len(speakers)} for {values.shape[1]} recordings; give one a recording")
    names, index = np.unique(np.asarray(speakers, dtype=str), return_inverse=True)
    member = np.eye(len(names))[index]  # (recordings, speakers)
    mean = values.mean(1, keepdims=True)
    return mean + (values - mean) @ member * (len(names) / values.shape[1])


def accuracy_interval(right: Sequence[bool], speakers: Sequence[str]) -> Optional[tuple[float, float]]:
    """95 % interval of an accuracy, over speakers.

    Recordings of one speaker are right or wrong together, so that they count for less than their number n. Wilson's
    interval is taken at the effective number p (1 - p) / var, where var is the variance between speakers (Dean and
    Pagano 2015), times (1.96 / t)^2 for the few degrees of freedom (Korn and Graubard 1998), at most n.

    Args:
        right: of each test recording, whether it was classified right.
        speakers: who speaks in each.

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
    """Why there is no interval over so many speakers; 0: nobody said who speaks."""
    known = f"{speakers} speaker{'s' * (speakers != 1)}" if speakers else "speakers unknown"
    return f"{known}, an interval needs {MIN_SPEAKERS} or more"


def show_interval(
    value: float, interval: Optional[Sequence[float]], scale: float = 100, digits: int = 1, signed: bool = False
) -> str:
    """A value and its interval as text, "12.3 [11.0, 13.5]"; only the value where there is none.

    Args:
        value, interval: by themselves; the interval's lower and upper bound.
        scale: what they are multiplied by; 100: per cent.
        digits: after the point.
        signed: with a plus too.
    """
    shown, *bounds = (f"{scale * number:{'+' if signed else ''}.{digits}f}" for number in (value, *(interval or ())))
    return f"{shown} [{', '.join(bounds)}]" if bounds else shown
