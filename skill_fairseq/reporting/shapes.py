"""Schemas of the files that a report reads, with one form of message for violations."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from skill_fairseq.clustering.plot import NAMES
from skill_fairseq.comparison.layer_distance import SHOWN
from skill_fairseq.comparison.summary import DISTANCE_VERDICTS, NOT_TOLD, OVERALL, PROBE_VERDICTS

Shape = Any
"""A type; None; ``[shape]``: a list of any length; ``[shape, shape]``: a list of that length; ``{"name": shape}``:
these fields and possibly others (a trailing ``?`` marks optional ones); ``{str: shape}``: any fields; ``{}``: no
fields; a tuple: one of these shapes; a set: one of these values."""

INTERVAL = ([float, float], None)
ESTIMATE = [float, (float, None), (float, None)]
WHY = (str, None)
PROBES = {
    "results": [
        {
            **{"model": str, "task": str, "metric": str, "value": float, "interval": INTERVAL},
            **{"parameters": (int, None), "correct?": int, "total?": int, "no_interval?": WHY},
        }
    ]
}
LAYER = (int, str)
CLUSTERS = {
    "groups": [[LAYER]],
    "layers": [LAYER],
    "measure": set(NAMES),
    "linkage": [[float, float, float, float]],
    "cut": {"by": str, "height": float},
    "matrices": {str: [[float]]},
    "teacher": ({"name": str}, [{"name": str}]),
    "calibration": {"manifest": str, "num_utterances": int, "num_frames": int, "seconds": float},
    "settings": {
        **{"linkage": str, "num_groups": (int, None), "height": (float, None), "silhouette": ([int, int], None)},
        **{"neighbours_only": bool, "no_layer_0": bool, "max_seconds": (float, None)},
        **{"max_utterances": (int, None), "seed": int},
    },
    "versions": {str: str},
}
HYDRA = {
    "hydra": {
        **{"job": {"config_name": (str, None)}, "overrides?": {"hydra?": [str]}, "runtime?": {"cwd?": str}},
    }
}
TOLD = {*PROBE_VERDICTS.values(), *DISTANCE_VERDICTS.values()} - {NOT_TOLD}
COSTS = {"parameters": float, "macs": float, "cpu_seconds": float}
BENCHMARK = {
    "baseline": str,
    "tasks": {str: {"metric": str, "samples": str, "no_interval": WHY}},
    "distances": {"no_interval": WHY},
    "references": {str: {"probes": {str: ESTIMATE}, "costs": (COSTS, None)}},
    "rows": [{"method": str}],
    "versions": {str: str},
    "settings": {str: object},
    "found": int,
    "wanted": int,
    "failed?": [str],
}


def check(value: Any, shape: Shape, where: str = "") -> None:
    """Compares a value read from JSON or YAML with a shape.

    Args:
        value: the value.
        shape: the expected shape, see :data:`Shape`.
        where: name of the value, such as ``results[3].interval``.

    Raises:
        ValueError: names the first wrong value, and what was expected.
    """
    if isinstance(shape, dict) and shape and isinstance(value, dict):
        for name, inner in shape.items():
            if name is str:
                for key, each in value.items():
                    check(each, inner, f"{where}.{key}".lstrip("."))
            elif name.rstrip("?") in value:
                check(value[name.rstrip("?")], inner, f"{where}.{name.rstrip('?')}".lstrip("."))
            elif not name.endswith("?"):
                raise ValueError(f"{where or 'the top'}: has no field {name!r}")
    elif isinstance(shape, list) and isinstance(value, list) and len(shape) in (1, len(value)):
        for place, each in enumerate(value):
            check(each, shape[place % len(shape)], f"{where}[{place}]")
    elif isinstance(shape, tuple) and len(shape) == 2 and shape[1] is None:
        if value is not None:
            check(value, shape[0], where)
    elif not _fits(value, shape):
        found = repr(value)
        raise ValueError(f"{where or 'the top'}: {found[:60]}{'...' * (len(found) > 60)}; expected {_words(shape)}")


def _fits(value: Any, shape: Shape) -> bool:
    """Whether a value matches a shape without parts, or one of several shapes."""
    if isinstance(shape, tuple):
        for each in shape:
            try:
                check(value, each)
                return True
            except ValueError:
                pass
        return False
    if isinstance(shape, set):
        return isinstance(value, str) and value in shape
    if shape is None or shape == {}:
        return bool(value == shape)
    if shape is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _MOST
    if shape is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _MOST
    if shape is str:
        return isinstance(value, str) and not _SURROGATES.search(value)
    return isinstance(shape, type) and isinstance(value, shape)


_MOST = 1e30
"""Pictures of larger numbers overflow; NaN and infinity fail this comparison too."""
_SURROGATES = re.compile("[\ud800-\udfff]")
"""Surrogates: JSON can hold a single one, pages and pictures cannot."""


def _words(shape: Shape) -> str:
    if isinstance(shape, tuple):
        return " or ".join(map(_words, shape))
    if isinstance(shape, list):
        return "a list" if len(shape) == 1 else f"a list of {len(shape)}"
    if isinstance(shape, set):
        return f"one of {', '.join(sorted(shape))}"
    if isinstance(shape, dict):
        return "nothing" if not shape else "fields" if str in shape else f"fields {', '.join(shape)}"
    return {float: "a finite number", int: "a whole number", str: "text", bool: "true or false", None: "null"}[shape]


def check_clusters(clusters: Any) -> None:
    """Checks the content of clusters.json: its fields, and that layers, groups, tree and matrix belong together.

    Raises:
        ValueError: names the field.
    """
    check(clusters, CLUSTERS)
    layers, measure, merges = clusters["layers"], clusters["measure"], clusters["linkage"]
    number = len(layers)
    matrix = clusters["matrices"].get(measure)
    if matrix is None or len(matrix) != number or any(len(row) != number for row in matrix):
        raise ValueError(f"matrices: expected {measure!r}, {number} rows of {number} numbers, one per layer")
    merged = [child for row in merges for child in row[:2]]
    earlier = all(child < number + place for place, row in enumerate(merges) for child in row[:2])
    if len(set(layers)) != number:
        raise ValueError(f"layers: {layers}; expected each once")
    if number < 2 or sorted(merged) != list(range(2 * number - 2)) or not earlier:
        raise ValueError(f"linkage: expected a tree of {number} layers, {number - 1} merges")
    grouped = [layer for group in clusters["groups"] for layer in group]
    if sorted(grouped, key=str) != sorted(layers, key=str) or [] in clusters["groups"]:
        raise ValueError("groups: expected every one of the layers in one group")
    settings, by = clusters["settings"], clusters["cut"]["by"]
    field = by if by in ("height", "silhouette") else "num_groups"
    if settings[field] is None:
        raise ValueError(f"settings.{field}: null, but cut.by is {by!r}")


def check_benchmark(summary: Any) -> None:
    """Checks the content of results.json from examples/benchmark/run.py.

    Raises:
        ValueError: names the field.
    """
    if isinstance(summary, dict) and summary.get("rows") == []:
        raise ValueError("rows: has no results, expected those of at least one run")
    check(summary, BENCHMARK)
    tasks, kinds = summary["tasks"], [f"{kind}?" for kind in SHOWN]  # students of another width have only CKA
    for name, reference in summary["references"].items():
        check(reference["probes"], _each(tasks, ESTIMATE), f"references.{name}.probes")
    judged = ({"estimate": ESTIMATE, "verdict": {NOT_TOLD}, "within": float}, {"estimate": ESTIMATE, "verdict": TOLD})
    row: Mapping[str, Shape] = {
        **{"method": str, "sparsity": (float, {OVERALL}), "seeds": [int], "made_by": [str]},
        "groups": [([[int]], None)],
        "probes": _each(tasks, ESTIMATE),
        "difference": ({}, _each(tasks, judged)),
        "recipe?": (str, None),
        "distance": _each(kinds, ESTIMATE),
        "distance_difference": ({}, _each(kinds, judged)),
        "layers": _each(kinds, [float]),
        "distilled": _each(kinds, (float, None)),
        "not_distilled": _each(kinds, (float, None)),
        "training_cpu_seconds?": (float, None),
        **COSTS,
        "actual_sparsity": float,
        "expected_sparsity": [(float, None)],
        "seconds": _each(("stage1", "stage2", "measure"), (float, None)),
    }
    for place, found in enumerate(summary["rows"]):
        check(found, row, f"rows[{place}]")
        if not found["groups"] or bool(found["difference"]) != bool(found["distance_difference"]):
            raise ValueError(f"rows[{place}]: expected groups, and differences of tasks and distances, or of neither")


def _each(names: Iterable[str], shape: Shape) -> dict[str, Shape]:
    return {name: shape for name in names}
