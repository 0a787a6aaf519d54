"""Everything that is measured of one student: what it knows, how near it is to the teacher, what it costs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.probing.classify import probe
from skill_fairseq.probing.pooling import Features, pool_files
from skill_fairseq.probing.tasks import Task

SECONDS = 10.0
"""Length of audio that MACs and time refer to."""


def probe_tasks(features: Features, tasks: Sequence[Task], name: str) -> dict[str, dict[str, Any]]:
    """Accuracy of frozen features on each task, with the outcome for every test recording.

    Args:
        features: samples to hidden states.
        tasks: classification tasks; recordings that they share are encoded once.
        name: beside the progress bar.

    Raises:
        ValueError: a task is verification, whose error rate has no outcome a recording.
    """
    for task in tasks:
        if task.trials is not None:
            raise ValueError(f"task {task.name}: is verification; the comparison takes tasks with labels alone")
    pooled = pool_files(features, (file for task in tasks for file in task.files), name)
    found = {}
    for task in tasks:
        split = {s: np.stack([pooled[file] for file in m.files]) for s, m in task.manifests.items()}
        result = probe(split, task.labels)
        found[task.name] = {
            "accuracy": result.accuracy,
            "correct": result.correct,
            "total": result.total,
            "classes": result.classes,
            "C": result.strength,
            "layer_weights": [round(weight, 5) for weight in result.layer_weights],
            "right": "".join(str(int(right)) for right in result.right),
        }
    return found


def right_of(entry: dict[str, Any]) -> np.ndarray:
    """(N,) 0 or 1 a test recording, from an entry of :func:`probe_tasks`."""
    return np.array([int(digit) for digit in entry["right"]], dtype=float)


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


def valid_files(manifest_path: Path) -> list[Path]:
    """The recordings of a manifest, checked."""
    from skill_fairseq.audio.manifest import check_manifest, read_manifest

    manifest = read_manifest(manifest_path)
    check_manifest(manifest)
    return list(manifest.files)
