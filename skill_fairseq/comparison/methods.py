"""What each method of the comparison distils: groups of teacher layers, by name.

Layers are numbered as hidden states are: 0 before the positional convolution, i after Transformer layer i.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional

import numpy as np

from skill_fairseq.clustering import linkage
from skill_fairseq.clustering.similarity import MEASURES

Groups = list[list[int]]

SKILL = "skill"
BY_MEASURE = {f"skill_{measure}": measure for measure in MEASURES}
METHODS = {
    SKILL: "groups of skill-cluster, as they are by default",
    **{name: f"groups of skill-cluster by --measure {measure}" for name, measure in BY_MEASURE.items()},
    "dphubert": "single layers at 0, 1/3, 2/3 and 1 of the depth; all but the first share a projection",
    "single_layers": "the layers of dphubert, a projection each",
    "all_layers": "every layer by itself",
    "last_layer": "the last layer alone",
    "random_groups": "groups of skill's sizes, layers drawn at random by the seed",
    "equal_runs": "as many groups as skill has, runs of neighbouring layers of equal size",
    "no_distillation": "the teacher pruned at once by the size of its weights, nothing trained",
}
"""Names and what they mean."""


class Target(NamedTuple):
    """What is distilled: groups of layers, and the value of ``criterion.projection_sharing``.

    Without groups nothing is trained.
    """

    groups: Optional[Groups]
    projection_sharing: Any = "none"


def check_methods(names: Sequence[str]) -> None:
    """Raises ValueError for a name that is no method, or stands there twice."""
    for name in names:
        if name not in METHODS:
            raise ValueError(f"methods: {name!r} is unknown; choose from {', '.join(METHODS)}")
        if names.count(name) > 1:
            raise ValueError(f"methods: {name!r} stands there {names.count(name)} times, expected once; remove one")


def target_of(method: str, clusters: Mapping[str, Any], seed: int) -> Target:
    """What a method distils.

    Args:
        method: a name of :data:`METHODS`.
        clusters: the content of clusters.json, as skill-cluster writes it; with ``--compare`` it holds every measure.
        seed: of the run; only ``random_groups`` looks at it.

    Raises:
        ValueError: unknown method, or the measure is not in ``clusters``.
    """
    check_methods([method])
    groups, layers = [list(group) for group in clusters["groups"]], list(clusters["layers"])
    if method == SKILL:
        return Target(groups)
    if method in BY_MEASURE:
        return Target(groups_by_measure(BY_MEASURE[method], clusters))
    if method == "random_groups":
        return Target(random_groups([len(group) for group in groups], layers, seed))
    if method == "equal_runs":
        return Target(equal_runs(layers, len(groups)))
    if method == "all_layers":
        return Target([[layer] for layer in layers])
    if method == "last_layer":
        return Target([[layers[-1]]])
    if method == "no_distillation":
        return Target(None)
    single = [[layer] for layer in spread_layers(layers[-1])]
    return Target(single, [0] + [1] * (len(single) - 1) if method == "dphubert" else "none")


def groups_by_measure(measure: str, clusters: Mapping[str, Any]) -> Groups:
    """As many groups by another measure, under the linkage that skill-cluster was given.

    Raises:
        ValueError: its distances are not there.
    """
    matrices = clusters["matrices"]
    if measure not in matrices:
        raise ValueError(
            f"clusters.json has the distances of {', '.join(matrices)}, not of {measure!r}; run skill-cluster --compare"
        )
    settings = clusters["settings"]
    tree = linkage.link(np.array(matrices[measure]), settings["linkage"], settings["neighbours_only"])
    found = linkage.cut_to_number(tree, len(clusters["groups"]))
    return [[clusters["layers"][index] for index in group] for group in found]


def random_groups(sizes: Sequence[int], layers: Sequence[int], seed: int) -> Groups:
    """Groups of these sizes over all layers, each ascending, drawn by the seed."""
    shuffled = list(layers)
    random.Random(seed).shuffle(shuffled)
    ends = np.cumsum([0, *sizes]).tolist()
    return [sorted(shuffled[start:end]) for start, end in zip(ends, ends[1:])]


def equal_runs(layers: Sequence[int], number: int) -> Groups:
    """Runs of neighbouring layers whose sizes differ by at most one, the longer first."""
    return [part.tolist() for part in np.array_split(np.array(layers), number)]


def spread_layers(depth: int) -> list[int]:
    """Layers at 0, 1/3, 2/3 and 1 of the depth, rounded half up: DPHuBERT's 0, 4, 8, 12 of 12; each once."""
    return sorted({(2 * part * depth + 3) // 6 for part in range(4)})
