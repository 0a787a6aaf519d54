"""What is left of a task where some of its recordings cannot be read."""

from __future__ import annotations

import dataclasses
from collections.abc import Container
from pathlib import Path
from typing import Any

from skill_fairseq.probing.tasks import Task


def readable_part(task: Task, files: Container[Path]) -> Task:
    """The task without the recordings that are not among these; labels, speakers and trials go with them.

    Args:
        task: as it was read.
        files: recordings that can be used.

    Raises:
        ValueError: nothing is left of a split, or no trial.
    """
    kept = {s: [i for i, file in enumerate(m.files) if file in files] for s, m in task.manifests.items()}
    if all(len(kept[split]) == len(manifest) for split, manifest in task.manifests.items()):
        return task
    changes: dict[str, Any] = {"manifests": {}, "labels": {}}
    for split, manifest in task.manifests.items():
        if not kept[split]:
            raise ValueError(f"{manifest.source}: none of its {len(manifest)} recordings can be read; replace them")
        changes["manifests"][split] = dataclasses.replace(
            manifest,
            paths=[manifest.paths[i] for i in kept[split]],
            sizes=[manifest.sizes[i] for i in kept[split]],
        )
        if split in task.labels:
            changes["labels"][split] = [task.labels[split][i] for i in kept[split]]
    if task.speakers is not None:  # of the test recordings
        changes["speakers"] = [task.speakers[i] for i in kept["test"]]
    if task.trials is not None:
        place = {old: new for new, old in enumerate(kept["test"])}
        changes["trials"] = [(s, place[a], place[b]) for s, a, b in task.trials if a in place and b in place]
        if not changes["trials"]:
            raise ValueError(f"{task.manifests['test'].source}: no trial is left whose recordings can be read")
    return dataclasses.replace(task, **changes)
