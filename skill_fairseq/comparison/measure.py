"""Everything that is measured of one student: what it knows, how near it is to the teacher, what it costs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.probing.classify import probe
from skill_fairseq.probing.pooling import Features, pool_files
from skill_fairseq.probing.tasks import Task
from skill_fairseq.probing.verify import Trial, error_rate_by_speaker

SECONDS = 10.0
"""Length of audio that MACs and time refer to."""


def probe_tasks(features: Features, tasks: Sequence[Task], name: str) -> dict[str, dict[str, Any]]:
    """What frozen features get in each task, with an outcome for each of what is a sample in it.

    Args:
        features: samples to hidden states.
        tasks: recordings that they share are encoded once.
        name: beside the progress bar.

    Returns:
        an entry a task, for JSON: ``metric`` ("accuracy" or "equal error rate"), ``value``, ``samples`` (what the task
        consists of, in words) and details; see :func:`outcomes`.
    """
    pooled = pool_files(features, (file for task in tasks for file in task.files), name)
    found = {}
    for task in tasks:
        split = {s: np.stack([pooled[file] for file in m.files]) for s, m in task.manifests.items()}
        found[task.name] = _classify(split, task) if task.trials is None else _verify(split["test"], task.trials)
    return found


def _classify(split: dict[str, np.ndarray], task: Task) -> dict[str, Any]:
    result = probe(split, task.labels)
    return {
        "metric": "accuracy",
        "value": result.accuracy,
        "samples": f"{result.total:,} recordings, {result.classes} classes",
        "correct": result.correct,
        "total": result.total,
        "C": result.strength,
        "layer_weights": [round(weight, 5) for weight in result.layer_weights],
        "right": "".join(str(int(right)) for right in result.right),
    }


def _verify(features: np.ndarray, trials: Sequence[Trial]) -> dict[str, Any]:
    rate, by_speaker = error_rate_by_speaker(features, trials)
    return {
        "metric": "equal error rate",
        "value": rate,
        "samples": f"{len(trials):,} pairs of recordings of {len(by_speaker)} speakers",
        "by_speaker": [round(value, 6) for value in by_speaker],
    }


def outcomes(entry: Mapping[str, Any]) -> np.ndarray:
    """(N,) numbers whose mean is the entry's value and whose spread is that of the task's samples.

    Accuracy: 0 or 1 a test recording. Equal error rate: a pseudo-value a speaker
    (:func:`skill_fairseq.probing.verify.error_rate_by_speaker`).
    """
    if "right" in entry:
        return np.array([int(digit) for digit in entry["right"]], dtype=float)
    return np.array(entry["by_speaker"], dtype=float)


@torch.no_grad()
def costs(encoder: SpeechEncoder, seconds: float = SECONDS, repeats: int = 7) -> dict[str, Any]:
    """Size, work and time of a forward.

    Args:
        encoder: any; is made ready for inference.
        seconds: of audio, one utterance.
        repeats: forwards timed, after one more that is not.

    Returns:
        ``parameters``; ``macs``; ``cpu_seconds``, the least processor time of all threads over the repeats: others
        on the machine can only add to it; ``threads``.
    """
    encoder.prepare()
    generator = torch.Generator().manual_seed(0)
    wave = 0.1 * torch.randn(1, round(seconds * encoder.config.sample_rate), generator=generator)
    encoder(wave)
    times = []
    for _ in range(repeats):
        began = time.process_time()
        encoder(wave)
        times.append(time.process_time() - began)
    return {
        "parameters": encoder.num_parameters(),
        "macs": encoder.macs(seconds),
        "cpu_seconds": min(times),
        "seconds_of_audio": seconds,
        "threads": torch.get_num_threads(),
    }


def distilled_layers(groups: Iterable[Iterable[int]] | None) -> list[int]:
    """Layers that take part in some group, ascending; none without groups."""
    return sorted({layer for group in groups or () for layer in group})
