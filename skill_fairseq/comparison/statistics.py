"""Means and paired differences with intervals, over seeds and speakers together.

A measurement is a matrix (seeds, recordings): whether a recording was classified right by the student of a seed, or
its distance to the teacher. Recordings of one speaker are not independent, so that they are first brought to a column a
speaker (:func:`skill_fairseq.probing.intervals.per_speaker`). Then both seeds and speakers are samples, and every seed
meets every speaker, so the mean's variance is that of a two-way random-effects model without replication (Cornfield and
Tukey 1956):

    var = (MS_seeds + MS_speakers - MS_residual) / (seeds * speakers)

with Satterthwaite's degrees of freedom for Student's t; seeds or speakers whose mean square is no larger than the
residual's do not count as a source of variation. Few seeds that disagree give a wide interval, as they must;
resampling three seeds would give one too narrow. With one seed only the speakers count as a sample. With fewer than
three speakers, or where nothing varies, there is no interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Optional

import numpy as np

from skill_fairseq.probing.intervals import MIN_SPEAKERS, per_speaker, student_t


class Estimate(NamedTuple):
    """A mean and its 95 % interval; None where there is no interval."""

    value: float
    low: Optional[float]
    high: Optional[float]

    @property
    def verdict(self) -> Optional[int]:
        """Of a difference: 1 or -1 where the whole interval lies on one side of 0; 0 where it holds 0, which is not
        to say that there is no difference; None without an interval."""
        if self.low is None or self.high is None:
            return None
        return int(self.low > 0) - int(self.high < 0)

    @property
    def within(self) -> Optional[float]:
        """Of a difference: the largest that the interval allows, to either side."""
        return None if self.low is None or self.high is None else max(abs(self.low), abs(self.high))


def crossed_mean(values: np.ndarray, speakers: Sequence[str]) -> Estimate:
    """Mean over seeds and recordings.

    Args:
        values: (S, N): seeds down, recordings across; S = 1 leaves seeds out.
        speakers: of each recording.

    Raises:
        ValueError: not a matrix, empty, not finite, or not one speaker a recording.
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
    if ms_rows <= ms_rest:  # no more than by chance: seeds do not matter
        terms = terms[1:2]
    elif ms_columns <= ms_rest:
        terms = terms[:1]
    square = sum(ms for ms, _ in terms)
    if square <= (1e-12 * largest) ** 2:  # rounding: nothing varies, so nothing is known of the spread
        return Estimate(mean, None, None)
    reach = student_t(square**2 / sum(ms**2 / freedom for ms, freedom in terms)) * math.sqrt(square / (seeds * items))
    return Estimate(mean, mean - reach, mean + reach)


def paired_difference(values: np.ndarray, baseline: np.ndarray, speakers: Sequence[str]) -> Estimate:
    """Mean of ``values - baseline``, seed by seed and recording by recording.

    Args:
        values, baseline: (S, N) of the same seeds and recordings; one row stands for every seed, for what no
            seed changes.
        speakers: of each recording.

    Raises:
        ValueError: other seeds or recordings.
    """
    values, baseline = np.atleast_2d(values).astype(float), np.atleast_2d(baseline).astype(float)
    rows = {len(values), len(baseline)}
    if values.shape[1] != baseline.shape[1] or (len(rows) > 1 and 1 not in rows):
        raise ValueError(
            f"shapes {values.shape} and {baseline.shape}: no pairs; give both the same seeds and recordings"
        )
    return crossed_mean(values - baseline, speakers)
