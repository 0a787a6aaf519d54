"""The methods of the comparison: groups of teacher layers to distil, by name.

Layers are numbered like hidden states: 0 before the positional convolution, i after Transformer layer i.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Optional

import numpy as np

from skill_fairseq.clustering.linkage import check_linkage, cut_to_number, link

Groups = list[list[int]]

SKILL = "skill"
METHODS = {
    SKILL: "groups of skill-cluster, as they are by default, a projection each",
    "dphubert": "single layers at 0, 1/3, 2/3 and 1 of the depth; all but the first share a projection",
    "single_layers": "the layers of dphubert, a projection each",
    "all_layers": "every layer by itself",
    "last_layer": "the last layer alone",
    "random_groups": "groups of skill's sizes, layers drawn at random by the seed",
    "equal_runs": "as many groups as skill has, runs of neighbouring layers of equal size",
    "no_distillation": "the teacher pruned at once by the size of its weights, nothing trained",
}
"""Names and descriptions."""


class Target(NamedTuple):
    """What to distil and how; without groups and recipe nothing is trained.

    Attributes:
        groups: groups of layers.
        projection_sharing: value of ``criterion.projection_sharing``.
        stage1, stage2: overrides of fairseq-hydra-train, after all others.
        recipe: config that replaces all of this, trained in one stage with the overrides of ``stage1``.
        then: config to train the student with afterwards, with the overrides of ``stage2``.
    """

    groups: Optional[Groups]
    projection_sharing: Any = "none"
    stage1: tuple[str, ...] = ()
    stage2: tuple[str, ...] = ()
    recipe: Optional[str] = None
    then: Optional[str] = None

    @property
    def trained(self) -> bool:
        """Whether anything is trained; if not, it does not depend on the seed."""
        return self.groups is not None or self.recipe is not None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        optional = ("recipe", "then")
        return {name: value for name, value in self._asdict().items() if name not in optional or value is not None}


class Recipe(NamedTuple):
    """A related system as a method.

    Attributes:
        config: folder/name below config/, without its suffix.
        overrides: overrides of fairseq-hydra-train, after all others.
        then: config of a second stage, which starts from the first stage's student.
    """

    config: str
    overrides: tuple[str, ...] = ()
    then: Optional[str] = None


Recipes = Mapping[str, Recipe]
Variant = Mapping[str, Any]
"""A grid's own method: like the method ``of`` (default skill), but with another ``clustering`` (arguments of
:func:`cluster_again`) or ``projection_sharing``, or with overrides of ``stage1``, ``stage2`` or ``both``."""
VARIANT_FIELDS = ("of", "clustering", "projection_sharing", "both", "stage1", "stage2")
CLUSTERING_FIELDS = ("measure", "linkage", "num_groups", "layer_0", "neighbours_only")


def read_methods(entries: Any, where: str) -> tuple[list[str], dict[str, Recipe]]:
    """Reads a grid's list of methods: names, and recipes as ``name: folder/config`` or, with overrides,
    ``name: {config: ..., overrides: [...], then: ...}``.

    Args:
        entries: the list from the file.
        where: its place, for messages.

    Returns:
        all names in order, and the recipes.

    Raises:
        ValueError: an entry is neither.
    """
    names, recipes = [], {}
    for entry in entries if isinstance(entries, list) else []:
        if not isinstance(entry, dict):
            names.append(entry)
            continue
        for name, found in entry.items():
            fields = {"config": found} if isinstance(found, str) else found
            words = fields.get("overrides", []) if isinstance(fields, dict) else None
            if not isinstance(words, list) or set(fields) - {"overrides", "then"} != {"config"}:
                raise ValueError(
                    f"{where}: methods.{name} is {found!r}; expected a config below config/, such as "
                    "distill/tiny_distilhubert, or {config: ..., overrides: [a.b=c, ...], then: finetune/...}"
                )
            if name in METHODS:
                raise ValueError(f"{where}: methods.{name} is already a method; give the recipe another name")
            names.append(name)
            recipes[name] = Recipe(str(fields["config"]), tuple(map(str, words)), fields.get("then"))
    return (names if isinstance(entries, list) else entries), recipes


def check_methods(
    names: Sequence[str], variants: Mapping[str, Variant] | None = None, recipes: Recipes | None = None
) -> None:
    """Checks that methods are known and named once, and that variants are well-formed.

    Raises:
        ValueError: they are not; names the method or the variant's field.
    """
    variants = variants or {}
    known = [*METHODS, *variants, *(recipes or ())]
    for name in names:
        if name not in known:
            raise ValueError(f"methods: {name!r} is unknown; choose from {', '.join(known)}")
        if names.count(name) > 1:
            raise ValueError(f"methods: {name!r} appears {names.count(name)} times, expected once; remove one")
    for name, variant in variants.items():
        where = f"variants.{name}"
        if name in METHODS:
            raise ValueError(f"{where}: is already a method; give the variant another name")
        _check_fields(where, variant, VARIANT_FIELDS)
        if variant.get("of", SKILL) not in METHODS:
            raise ValueError(f"{where}.of: {variant['of']!r} is not a method; choose from {', '.join(METHODS)}")
        _check_fields(f"{where}.clustering", variant.get("clustering", {}), CLUSTERING_FIELDS)
        if variant.get("clustering") and variant.get("of", SKILL) != SKILL:
            raise ValueError(f"{where}.clustering: of {variant['of']!r}, which does not cluster; remove one of the two")
        for field in ("both", "stage1", "stage2"):
            found = variant.get(field, [])
            if not isinstance(found, list) or not all(isinstance(word, str) for word in found):
                raise ValueError(f"{where}.{field}: {found!r}; expected a list of overrides, [a.b=c, ...]")


def _check_fields(where: str, found: Any, fields: Collection[str]) -> None:
    if not isinstance(found, Mapping) or set(found) - set(fields):
        raise ValueError(f"{where}: {found!r}; expected a mapping with some of {', '.join(fields)}")


def target_of(
    method: str,
    clusters: Mapping[str, Any],
    seed: int,
    variants: Mapping[str, Variant] | None = None,
    recipes: Recipes | None = None,
) -> Target:
    """The target of a method.

    Args:
        method: a name of :data:`METHODS`, of a variant or of a recipe.
        clusters: the content of clusters.json, as skill-cluster writes it; with ``--compare`` it holds every measure.
        seed: the run's seed; only ``random_groups`` uses it.
        variants, recipes: the grid's.

    Raises:
        ValueError: the method is unknown, or the measure is not in ``clusters``.
    """
    check_methods([method], variants, recipes)
    if recipes and method in recipes:
        recipe = recipes[method]
        return Target(None, stage1=recipe.overrides, recipe=recipe.config, then=recipe.then)
    if variants and method in variants:
        variant = variants[method]
        target = target_of(variant.get("of", SKILL), clusters, seed)
        if variant.get("clustering"):
            target = target._replace(groups=cluster_again(clusters, **variant["clustering"]))
        both = variant.get("both", [])
        return target._replace(
            projection_sharing=variant.get("projection_sharing", target.projection_sharing),
            stage1=(*both, *variant.get("stage1", [])),
            stage2=(*both, *variant.get("stage2", [])),
        )
    groups, layers = [list(group) for group in clusters["groups"]], list(clusters["layers"])
    if method == SKILL:
        return Target(groups)
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


def cluster_again(
    clusters: Mapping[str, Any],
    measure: str | None = None,
    linkage: str | None = None,
    num_groups: int | None = None,
    layer_0: bool = True,
    neighbours_only: bool | None = None,
) -> Groups:
    """Groups from skill-cluster's distances, with some options changed.

    Args:
        clusters: the content of clusters.json; its settings replace None.
        layer_0: False excludes layer 0.

    Raises:
        ValueError: the measure's distances are missing, or an option is not usable.
    """
    settings, matrices = clusters["settings"], clusters["matrices"]
    measure = measure or clusters["measure"]
    if measure not in matrices:
        raise ValueError(
            f"clusters.json has the distances of {', '.join(matrices)}, not of {measure!r}; run skill-cluster --compare"
        )
    method = linkage or settings["linkage"]
    check_linkage(method, measure)
    kept = [index for index, layer in enumerate(clusters["layers"]) if layer_0 or layer != 0]
    distances = np.array(matrices[measure])[np.ix_(kept, kept)]
    together = settings["neighbours_only"] if neighbours_only is None else neighbours_only
    tree = link(distances, method, together)
    found = cut_to_number(tree, num_groups or len(clusters["groups"]))
    return [[clusters["layers"][kept[index]] for index in group] for group in found]


def random_groups(sizes: Sequence[int], layers: Sequence[int], seed: int) -> Groups:
    """Random groups of these sizes over all layers, each ascending, from the seed."""
    shuffled = list(layers)
    random.Random(seed).shuffle(shuffled)
    ends = np.cumsum([0, *sizes]).tolist()
    return [sorted(shuffled[start:end]) for start, end in zip(ends, ends[1:])]


def equal_runs(layers: Sequence[int], number: int) -> Groups:
    """Runs of neighbouring layers whose sizes differ by at most one, longer ones first."""
    return [part.tolist() for part in np.array_split(np.array(layers), number)]


def spread_layers(depth: int) -> list[int]:
    """Layers at 0, 1/3, 2/3 and 1 of the depth, rounded half up: DPHuBERT's 0, 4, 8, 12 of 12; each once."""
    return sorted({(2 * part * depth + 3) // 6 for part in range(4)})
