"""Probes one model: one entry per task, which skill-probe writes and comparisons read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from skill_fairseq.messages import require
from skill_fairseq.probing.classify import probe
from skill_fairseq.probing.intervals import why_none
from skill_fairseq.probing.letters import probe_letters
from skill_fairseq.probing.pooling import Features, frames_of, pool_files
from skill_fairseq.probing.tasks import Task, readable_part
from skill_fairseq.probing.verify import verify


def evaluate(features: Features, tasks: Sequence[Task], name: str) -> dict[str, dict[str, Any]]:
    """Results of frozen features in each task, with the outcome of every sample.

    Args:
        features: samples to hidden states.
        tasks: recordings that they share are encoded once, except for letters, which need every frame.
        name: label of the progress bar.

    Returns:
        one entry per task, for JSON: ``metric`` ("accuracy", "equal error rate" or "letter error rate"), ``value`` and
        ``interval`` (0 to 1; None where there is none, and ``no_interval`` says why), ``samples`` (the test data, in
        words), ``skipped`` (recordings that cannot be read; the log names them) and details with each sample's
        outcome, from which any statistic can be computed again; see :func:`outcomes`.
    """
    files = [file for task in tasks if not task.transcribed for file in task.files]
    pooled = pool_files(features, files, name) if files else {}
    found = {}
    for whole in tasks:
        if whole.transcribed:
            found[whole.name] = _letters(features, whole, name)
            continue
        task = readable_part(whole, pooled)
        split = {s: np.stack([pooled[file] for file in m.files]) for s, m in task.manifests.items()}
        found[task.name] = _classify(split, task) if task.trials is None else _verify(split["test"], task)
        found[task.name]["skipped"] = len(whole.files) - len(task.files)
    return found


def _classify(split: Mapping[str, np.ndarray], task: Task) -> dict[str, Any]:
    speakers = task.speakers or []
    result = probe(split, task.labels, speakers)
    number = len(set(speakers))
    return {
        "metric": "accuracy",
        "value": result.accuracy,
        "interval": result.interval,
        "no_interval": why_none(number) if result.interval is None else None,
        "samples": f"{result.total:,} recordings of {number} speakers, {result.classes} classes",
        "correct": result.correct,
        "total": result.total,
        "classes": result.classes,
        "C": result.strength,
        "layer_weights": result.layer_weights,
        "right": "".join(str(int(right)) for right in result.right),
        "speakers": speakers,
    }


def _letters(features: Features, whole: Task, name: str) -> dict[str, Any]:
    states = frames_of(features, whole.files, f"{name}, {whole.name}")
    task = readable_part(whole, states)
    split = {s: [states[file] for file in m.files] for s, m in task.manifests.items()}
    result = probe_letters(split, task.labels, task.speakers or [])
    total = len(result.errors)
    return {
        "metric": "letter error rate",
        "value": result.rate,
        "interval": result.interval,
        "no_interval": result.no_interval,
        "samples": f"{result.letters:,} letters in {total:,} recordings of {len(result.speakers)} speakers",
        "symbols": result.symbols,
        "epoch": result.epoch,
        "layer_weights": result.layer_weights,
        "errors": result.errors,
        "lengths": result.lengths,
        "by_speaker": result.by_speaker,
        "speakers": result.speakers,
        "skipped": len(whole.files) - len(task.files),
    }


def _verify(features: np.ndarray, task: Task) -> dict[str, Any]:
    trials = task.trials or []
    result = verify(features, trials, task.speakers)
    heard = {index for _, *pair in trials for index in pair}
    number = len({task.speakers[index] for index in heard}) if task.speakers else "unknown"
    return {
        "metric": "equal error rate",
        "value": result.eer,
        "interval": result.interval,
        "no_interval": result.no_interval,
        "samples": f"{len(trials):,} pairs of {len(heard):,} recordings of {number} speakers",
        "trials": len(trials),
        "by_speaker": result.by_speaker,
        "scores": result.scores,
        "speakers": result.speakers,
    }


def outcomes(entry: Mapping[str, Any]) -> tuple[np.ndarray, list[str]]:
    """Numbers whose mean is the entry's value, and the speaker of each number.

    Accuracy: 0 or 1 per test recording. Error rates: a pseudo-value per speaker
    (:class:`skill_fairseq.probing.verify.VerificationResult`, :func:`skill_fairseq.probing.letters.by_speaker`);
    without speakers, only the rate.
    """
    if "right" in entry:
        return np.array([int(digit) for digit in entry["right"]], dtype=float), list(entry["speakers"])
    if not entry.get("by_speaker"):
        return np.array([entry["value"]]), ["unknown"]
    return np.array(entry["by_speaker"], dtype=float), list(entry["speakers"])


def require_scikit_learn(tasks: Sequence[Task]) -> None:
    """Checks before any work that what the tasks need is installed.

    Raises:
        ValueError: a task needs scikit-learn, which is not installed.
    """
    for task in tasks:
        if task.trials is None and not task.transcribed:
            require(f"task {task.name!r}, whose classification takes scikit-learn", "sklearn")
