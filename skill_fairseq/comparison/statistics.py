"""Means and paired differences with intervals, over seeds and recordings together.

A measurement is a matrix (seeds, recordings): whether a recording was classified right by the student of a seed, or
its distance to the teacher. Both seeds and recordings are samples, and every seed meets every recording, so the
mean's variance is that of a two-way random-effects model without replication (Cornfield and Tukey 1956):

    var = (MS_seeds + MS_recordings - MS_residual) / (seeds * recordings)

with Satterthwaite's degrees of freedom for Student's t. Few seeds that disagree give a wide interval, as they must;
resampling three seeds would give one too narrow. With one seed only the recordings count as a sample. Recordings are
taken as independent of each other: how results vary with the choice of speakers is not covered.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A mean and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> int:
        """Of a difference: 1 or -1 where the whole interval lies on one side of 0, else 0, no difference."""
        return int(self.low > 0) - int(self.high < 0)


def crossed_mean(values: np.ndarray) -> Estimate:
    """Mean over seeds and recordings.

    Args:
        values: (S, N): seeds down, recordings across; S = 1 or N = 1 leaves that source of variation out.

    Raises:
        ValueError: not a matrix, empty, or not finite.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"values: shape {values.shape}; expected (seeds, recordings), none empty, all finite")
    seeds, items = values.shape
    mean = float(values.mean())
    rows, columns = values.mean(1), values.mean(0)
    ms_rows = items * float(rows.var(ddof=1)) if seeds > 1 else 0.0
    ms_columns = seeds * float(columns.var(ddof=1)) if items > 1 else 0.0
    terms = [(ms_rows, seeds - 1), (ms_columns, items - 1)]
    if seeds > 1 and items > 1:
        residual = values - rows[:, None] - columns[None, :] + mean
        freedom = (seeds - 1) * (items - 1)
        terms.append((-float((residual**2).sum()) / freedom, freedom))
    square = sum(ms for ms, _ in terms)
    # The estimate can fall below what seeds or recordings alone say, by chance: the larger of the two bounds it.
    square = max(square, ms_rows, ms_columns)
    if square <= 0:
        return Estimate(mean, mean, mean)
    freedom_of_sum = square**2 / sum(ms**2 / freedom for ms, freedom in terms if freedom)
    reach = student_t(freedom_of_sum) * math.sqrt(square / (seeds * items))
    return Estimate(mean, mean - reach, mean + reach)


def paired_difference(values: np.ndarray, baseline: np.ndarray) -> Estimate:
    """Mean of ``values - baseline``, seed by seed and recording by recording.

    Args:
        values, baseline: (S, N) of the same seeds and recordings; one row stands for every seed, for what no
            seed changes.

    Raises:
        ValueError: other seeds or recordings.
    """
    values, baseline = np.atleast_2d(values).astype(float), np.atleast_2d(baseline).astype(float)
    rows = {len(values), len(baseline)}
    if values.shape[1] != baseline.shape[1] or (len(rows) > 1 and 1 not in rows):
        raise ValueError(
            f"shapes {values.shape} and {baseline.shape}: no pairs; give both the same seeds and recordings"
        )
    return crossed_mean(values - baseline)


def student_t(freedom: float) -> float:
    """Two-sided 95 % quantile of Student's t with so many degrees of freedom."""
    from scipy.stats import t

    return float(t.ppf(0.5 + CONFIDENCE / 2, freedom))
