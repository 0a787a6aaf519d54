"""Probes of several models over several seeds, beside a baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from skill_fairseq.comparison.statistics import crossed_mean, paired_difference
from skill_fairseq.comparison.summary import PROBE_VERDICTS, judged, plain, within_bounds
from skill_fairseq.probing.evaluate import outcomes

Entry = Mapping[str, Any]


def compare_probes(seeds: Mapping[str, Sequence[Entry]], baseline: str) -> list[dict[str, Any]]:
    """Means over seeds and speakers, and differences paired by seed and recording.

    Args:
        seeds: name -> ``results`` of `skill-probe --json`; the same model has the same name with every seed.
        baseline: name of a model.

    Returns:
        for each model and task: metric, number of seeds, ``estimate`` (mean, lower and upper bound) and ``difference``
        to the baseline (None for itself): ``estimate``, ``verdict`` and ``within``, the largest absolute value.

    Raises:
        ValueError: there is no such baseline, or seeds differ in their models, tasks or recordings.
    """
    for name, results in seeds.items():
        keys = [(entry["model"], entry["task"]) for entry in results]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice:
            raise ValueError(
                f"{name}: holds model {twice[0]!r} with task {twice[1]!r} twice; expected one result of each"
            )
    by_seed = {name: {(entry["model"], entry["task"]): entry for entry in entries} for name, entries in seeds.items()}
    first, wanted = next(iter(by_seed.items()))
    models = list(dict.fromkeys(model for model, _ in wanted))
    if baseline not in models:
        raise ValueError(f"--baseline: {baseline!r} is not in {first}; expected one of {', '.join(models)}")
    missing = [task for _, task in wanted if (baseline, task) not in wanted]
    if missing:
        raise ValueError(
            f"{first}: has no result of the baseline {baseline!r} in task {missing[0]!r}; probe it there too"
        )
    values: dict[tuple[str, str], np.ndarray] = {}
    speakers: dict[str, list[str]] = {}
    for model, task in wanted:
        told = []
        for name, entries in by_seed.items():
            if set(entries) != set(wanted):
                raise ValueError(f"{name}: has other models or tasks than {first}; probe the same with every seed")
            numbers, names = outcomes(entries[model, task])
            if names != speakers.setdefault(task, names) or len(numbers) != len(names):
                raise ValueError(
                    f"{name}: {model} was probed in {task!r} on other recordings than {models[0]} in {first}; use the "
                    "same task, and remove recordings that cannot be read"
                )
            told.append(numbers)
        values[model, task] = np.array(told)
    rows = []
    for (model, task), found in values.items():
        less = paired_difference(found, values[baseline, task], speakers[task])
        rows.append(
            {
                **{"model": model, "task": task, "metric": wanted[model, task]["metric"], "seeds": len(seeds)},
                "estimate": plain(within_bounds(crossed_mean(found, speakers[task]))),
                "difference": None if model == baseline else judged(less, PROBE_VERDICTS),
            }
        )
    return rows
