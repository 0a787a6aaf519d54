"""Speaker verification without training: cosine scores of pairs and their equal error rate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Optional, Union

import numpy as np

from skill_fairseq.probing.intervals import MIN_SPEAKERS, student_t, why_none

Trial = tuple[bool, int, int]
"""Same speaker, and the indices of two recordings."""


@dataclasses.dataclass(frozen=True)
class VerificationResult:
    """Outcome of one verification task.

    Attributes:
        eer: equal error rate, 0 to 1; lower is better, 0.5 is chance.
        interval: 95 % interval of it, over speakers, or None.
        scores: of each pair.
        speakers: sorted by name; empty where there are no pseudo-values.
        by_speaker: a pseudo-value a speaker; their mean is the rate, and the difference of two models' stands for the
            difference of their rates.
        no_interval: why there is none.
    """

    eer: float
    interval: Optional[tuple[float, float]]
    scores: list[float]
    speakers: list[str]
    by_speaker: list[float]
    no_interval: Optional[str]


def cosine_scores(features: np.ndarray, pairs: Union[np.ndarray, Sequence[tuple[int, int]]]) -> np.ndarray:
    """Cosine similarity of pairs of recordings.

    Every dimension of every layer is standardised over all recordings given (no labels are used), then the
    layers are averaged with equal weights.

    Args:
        features: (N, layers, F) statistics.
        pairs: (pairs, 2) indices of two recordings each.

    Returns:
        (pairs,) in [-1, 1].
    """
    spread = features.std(0)
    standard = (features - features.mean(0)) / np.where(spread > 1e-6, spread, 1.0)
    vectors = standard.mean(1)
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    first, second = np.asarray(pairs).T
    return np.einsum("nf,nf->n", vectors[first], vectors[second])


def equal_error_rate(scores: np.ndarray, same: np.ndarray) -> float:
    """Rate at which false rejections and false acceptances are equally frequent.

    A pair is accepted where its score is at least the threshold. Between two thresholds the rates are
    interpolated linearly.

    Args:
        scores: (n,) higher = more alike.
        same: (n,) bool, True for pairs of one speaker.

    Returns:
        0 to 1.

    Raises:
        ValueError: not both kinds of pairs are there.
    """
    same = np.asarray(same, dtype=bool)
    if not same.any() or same.all():
        raise ValueError(f"same: {int(same.sum())} of {same.size} pairs, expected both kinds; add trials")
    order = np.argsort(-scores, kind="stable")
    last_of_ties = np.append(np.diff(scores[order]) != 0, True)
    accepted = np.cumsum(same[order])[last_of_ties] / same.sum()
    false_accept = np.concatenate([[0.0], np.cumsum(~same[order])[last_of_ties] / (~same).sum()])
    false_reject = np.concatenate([[1.0], 1.0 - accepted])
    gap = false_accept - false_reject  # rises from -1 to 1
    after = int(np.argmax(gap >= 0))
    share = -gap[after - 1] / (gap[after] - gap[after - 1])
    return float(false_accept[after - 1] + share * (false_accept[after] - false_accept[after - 1]))


def verify(features: np.ndarray, trials: Sequence[Trial], speakers: Optional[Sequence[str]]) -> VerificationResult:
    """Score trials and give the equal error rate with its interval.

    Trials that share a speaker are not independent; speakers are. So the rate is computed again without each speaker
    (delete-a-group jackknife, Shao and Wu 1989) and brought to centred pseudo-values, whose mean is the rate itself
    and whose variance over the number of speakers is the rate's; the interval is Student's, cut off at 0 and 1. An
    equal error rate is no smooth function of the scores, so this is an approximation: in the simulations of
    tests/probing/test_verify.py it errs to the wide side.

    Args:
        features: (N, layers, F) statistics.
        trials: pairs of recordings.
        speakers: of each recording; None: unknown, and no interval.

    Returns:
        see `VerificationResult`.
    """
    same = np.array([trial[0] for trial in trials], dtype=bool)
    pairs = np.array([trial[1:] for trial in trials])
    scores = cosine_scores(features, pairs)
    rate = equal_error_rate(scores, same)
    result = VerificationResult(rate, None, scores.round(6).tolist(), [], [], None)
    who = np.unique([]) if speakers is None else np.asarray(speakers, dtype=str)[pairs]
    names = np.unique(who)
    number = len(names)
    if number < MIN_SPEAKERS:
        return dataclasses.replace(result, no_interval=why_none(number))
    without = []
    for name in names:
        rest = (who != name).all(1)
        if same[rest].all() or not same[rest].any():
            why = f"without speaker {name} both kinds of pairs are not left"
            return dataclasses.replace(result, no_interval=why)
        without.append(equal_error_rate(scores[rest], same[rest]))
    pseudo = rate + (number - 1) * (np.mean(without) - np.array(without))
    result = dataclasses.replace(result, speakers=names.tolist(), by_speaker=pseudo.tolist())
    if np.ptp(without) == 0:
        return dataclasses.replace(result, no_interval="leaving out any speaker changes nothing")
    reach = student_t(number - 1) * float(pseudo.std(ddof=1)) / math.sqrt(number)
    return dataclasses.replace(result, interval=(max(rate - reach, 0.0), min(rate + reach, 1.0)))
