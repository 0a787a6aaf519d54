"""Probes of one model: an entry a task, as skill-probe writes and comparisons read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from skill_fairseq.probing.classify import probe
from skill_fairseq.probing.pooling import Features, pool_files
from skill_fairseq.probing.tasks import Task
from skill_fairseq.probing.verify import Trial, verify


def evaluate(features: Features, tasks: Sequence[Task], name: str) -> dict[str, dict[str, Any]]:
    """What frozen features get in each task, with an outcome for each of what is a sample in it.

    Args:
        features: samples to hidden states.
        tasks: recordings that they share are encoded once.
        name: beside the progress bar.

    Returns:
        an entry a task, for JSON: ``metric`` ("accuracy" or "equal error rate"), ``value`` and ``interval`` (0 to 1),
        ``samples`` (what the task consists of, in words) and details; see :func:`outcomes`.
    """
    pooled = pool_files(features, (file for task in tasks for file in task.files), name)
    found = {}
    for task in tasks:
        split = {s: np.stack([pooled[file] for file in m.files]) for s, m in task.manifests.items()}
        found[task.name] = _classify(split, task) if task.trials is None else _verify(split["test"], task.trials)
    return found


def _classify(split: Mapping[str, np.ndarray], task: Task) -> dict[str, Any]:
    result = probe(split, task.labels)
    return {
        "metric": "accuracy",
        "value": result.accuracy,
        "interval": result.interval,
        "samples": f"{result.total:,} recordings, {result.classes} classes",
        "correct": result.correct,
        "total": result.total,
        "classes": result.classes,
        "C": result.strength,
        "layer_weights": result.layer_weights,
        "right": "".join(str(int(right)) for right in result.right),
    }


def _verify(features: np.ndarray, trials: Sequence[Trial]) -> dict[str, Any]:
    result = verify(features, trials)
    return {
        "metric": "equal error rate",
        "value": result.eer,
        "interval": result.interval,
        "samples": f"{result.trials:,} pairs of recordings of {len(result.by_speaker)} speakers",
        "trials": result.trials,
        "by_speaker": result.by_speaker,
    }


def outcomes(entry: Mapping[str, Any]) -> np.ndarray:
    """(N,) numbers whose mean is the entry's value and whose spread is that of the task's samples.

    Accuracy: 0 or 1 a test recording. Equal error rate: a pseudo-value a speaker
    (:class:`skill_fairseq.probing.verify.VerificationResult`).
    """
    if "right" in entry:
        return np.array([int(digit) for digit in entry["right"]], dtype=float)
    return np.array(entry["by_speaker"], dtype=float)
