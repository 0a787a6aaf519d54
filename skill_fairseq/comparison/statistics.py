"""Means and paired differences with intervals, over seeds and speakers together.

A measurement is a matrix (seeds, recordings): whether the student of a seed classified a recording correctly, or its
distance to the teacher. Recordings of one speaker are not independent, so they are first reduced to one column per
speaker (:func:`skill_fairseq.probing.intervals.per_speaker`). Both seeds and speakers are then samples, and every seed
meets every speaker, so the mean's variance is that of a two-way random-effects model without replication (Cornfield and
Tukey 1956):

    var = (MS_seeds + MS_speakers - MS_residual) / (seeds * speakers)

with Satterthwaite's degrees of freedom for Student's t; seeds or speakers whose mean square is no larger than the
residual's do not count as a source of variation. If a few seeds disagree, the interval is wide, as it must be;
resampling three seeds would give too narrow a one. With one seed only the speakers count as a sample. With fewer than
three speakers, or without variation, there is no interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Optional

import numpy as np

from skill_fairseq.probing.intervals import MIN_SPEAKERS, per_speaker, student_t


class Estimate(NamedTuple):
    """A mean and its 95 % interval, or None."""

    value: float
    low: Optional[float]
    high: Optional[float]

    @property
    def verdict(self) -> Optional[int]:
        """For a difference: 1 or -1 if the whole interval is on one side of 0; 0 if it contains 0, which does not mean
        that there is no difference; None without an interval."""
        if self.low is None or self.high is None:
            return None
        return int(self.low > 0) - int(self.high < 0)

    @property
    def within(self) -> Optional[float]:
        """For a difference: the largest absolute value within the interval."""
        return None if self.low is None or self.high is None else max(abs(self.low), abs(self.high))


def crossed_mean(values: np.ndarray, speakers: Sequence[str]) -> Estimate:
    """Mean over seeds and recordings.

    Args:
        values: (S, N), seeds and recordings; S = 1 ignores seeds.
        speakers: speaker of each recording.

    Raises:
        ValueError: values are not a matrix, empty or not finite, or there is not one speaker per recording.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"values: shape {values.shape}; expected (seeds, recordings), none empty, all finite")
    largest = float(np.abs(values).max())
    values = per_speaker(values, speakers)
    seeds, items = values.shape
    mean = float(values.mean())
    if items < MIN_SPEAKERS:
        return Estimate(mean, None, None)
    rows, columns = values.mean(1), values.mean(0)
    ms_rows = items * float(rows.var(ddof=1)) if seeds > 1 else 0.0
    ms_columns = seeds * float(columns.var(ddof=1))
    residual = values - rows[:, None] - columns[None, :] + mean
    ms_rest = float((residual**2).sum()) / ((seeds - 1) * (items - 1)) if seeds > 1 else 0.0
    terms = [(ms_rows, seeds - 1), (ms_columns, items - 1), (-ms_rest, (seeds - 1) * (items - 1))]
    if ms_rows <= ms_rest:  # no more than chance: seeds do not matter
        terms = terms[1:2]
    elif ms_columns <= ms_rest:
        terms = terms[:1]
    square = sum(ms for ms, _ in terms)
    if square <= (1e-12 * largest) ** 2:  # only rounding: without variation the spread is unknown
        return Estimate(mean, None, None)
    reach = student_t(square**2 / sum(ms**2 / freedom for ms, freedom in terms)) * math.sqrt(square / (seeds * items))
    return Estimate(mean, mean - reach, mean + reach)


def paired_difference(values: np.ndarray, baseline: np.ndarray, speakers: Sequence[str]) -> Estimate:
    """Mean of ``values - baseline``, paired by seed and recording.

    Args:
        values, baseline: (S, N) for the same seeds and recordings; a single row is used for every seed, for results
            without a seed.
        speakers: speaker of each recording.

    Raises:
        ValueError: seeds or recordings differ.
    """
    values, baseline = np.atleast_2d(values).astype(float), np.atleast_2d(baseline).astype(float)
    rows = {len(values), len(baseline)}
    if values.shape[1] != baseline.shape[1] or (len(rows) > 1 and 1 not in rows):
        raise ValueError(
            f"shapes {values.shape} and {baseline.shape}: not paired; give both the same seeds and recordings"
        )
    return crossed_mean(values - baseline, speakers)
