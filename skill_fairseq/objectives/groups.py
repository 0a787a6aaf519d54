"""Reading and checking groups of layers.

Layers are numbered like hidden states: 0 before the positional convolution, i after Transformer layer i. A plain number
is a layer of the first teacher; ``1/4`` is layer 4 of the second (teachers count from 0). YAML and hydra's command line
read that as text, quoted or not; YAML 1.1 would read ``1:4`` as the number 64.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Union

import yaml

from skill_fairseq.files import named
from skill_fairseq.reading import read_text

Layer = Union[int, str]
"""A layer as configs write it: a number, or ``k/i`` for layer i of teacher k >= 1."""
Groups = tuple[tuple[Layer, ...], ...]
StudentGroups = tuple[tuple[int, ...], ...]

_OF_TEACHER = re.compile("([0-9]{1,3})/([0-9]{1,3})")

MAX_GROUPS_FILE = 1_000_000


def read_groups(groups: Any, groups_file: str | None, field: str = "criterion") -> Any:
    """The groups as the config, or the file that it names, holds them; not yet checked.

    Args:
        groups, groups_file: values of the config; exactly one must be set.
        field: config path of both, for messages.

    Raises:
        ValueError: neither or both are given, or the file has no groups.
        FileNotFoundError: the file is missing.
    """
    if (groups is None) == (groups_file is None):
        raise ValueError(
            f"{field}.groups: {groups}, {field}.groups_file: {groups_file}; give one of them, for example the groups "
            "that skill-cluster prints"
        )
    if groups_file is None:
        return groups
    field, path = f"{field}.groups_file", Path(groups_file)
    if not path.is_file():
        raise FileNotFoundError(f"{field}: {path} does not exist; write it with skill-cluster")
    if path.stat().st_size > MAX_GROUPS_FILE:
        raise ValueError(
            f"{field}: {path} has {path.stat().st_size:,} bytes; expected at most {MAX_GROUPS_FILE:,}: name the file "
            "of skill-cluster"
        )
    with named(field):
        text = read_text(path)
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:  # dates, keys and nesting raise these
        raise ValueError(f"{field}: {path} is not valid YAML ({error}); write it with skill-cluster") from error
    found = content.get("groups") if isinstance(content, dict) else None
    if found is None and isinstance(content, dict) and isinstance(content.get("criterion"), dict):
        found = content["criterion"].get("groups")
    if found is None:
        raise ValueError(f"{field}: {path} has no key 'groups'; write it with skill-cluster")
    return found


def layer_name(teacher: int, layer: int) -> Layer:
    """Layer i of teacher k as configs write it: the number for the first teacher, ``k/i`` for the others."""
    return f"{teacher}/{layer}" if teacher else layer


def layer_of(name: Any) -> tuple[int, int]:
    """Teacher and layer, both from 0, from a name that :func:`layer_name` wrote.

    Raises:
        ValueError: it is neither a number nor ``k/i``.
    """
    if isinstance(name, int) and not isinstance(name, bool):
        return 0, name
    parts = _OF_TEACHER.fullmatch(name) if isinstance(name, str) else None
    if parts is None:
        raise ValueError(f"layer {_shown(name)}, neither an integer nor like 1/4, layer 4 of the second teacher")
    return int(parts[1]), int(parts[2])


def by_teacher(group: Sequence[Layer]) -> dict[int, tuple[int, ...]]:
    """A group's layers by teacher, teachers in ascending order."""
    found = [layer_of(name) for name in group]
    return {k: tuple(layer for of, layer in found if of == k) for k in sorted({k for k, _ in found})}


def parse_groups(value: Any, depths: int | Sequence[int], field: str = "criterion.groups") -> Groups:
    """Checks groups of teacher layers as a config holds them.

    Args:
        value: sequence of sequences (lists, tuples, omegaconf's) of layers, such as ``[[0], [4, 1/2], [8, 1/3]]``.
        depths: Transformer layers of the teacher, or of each; layers from 0 to this number are valid.
        field: where the value comes from, for messages.

    Returns:
        the groups, in the order given; layers of the first teacher as numbers.

    Raises:
        ValueError: there is no group, a group is empty or not a sequence of layers, or a layer does not exist or
            appears twice.
    """
    depths = [depths] if isinstance(depths, int) else depths
    others = [f", {layer_name(k, 0)}..{layer_name(k, depth)}" for k, depth in enumerate(depths) if k]
    remedy = f"give groups of layers 0..{depths[0]}{''.join(others)}, each at most once, such as [[0],[{depths[0]}]]"
    if not is_sequence(value) or not len(value):
        raise ValueError(f"{field} is {_shown(value)}, but must be a list of at least one group; {remedy}")
    seen: set[tuple[int, int]] = set()
    for group in value:
        if not is_sequence(group) or not len(group):
            raise ValueError(f"{field} has the group {_shown(group)}, which is not a list of layers; {remedy}")
        for name in group:
            try:
                teacher, layer = layer_of(name)
            except ValueError as error:
                raise ValueError(f"{field} names the {error}; {remedy}") from None
            if teacher >= len(depths):
                raise ValueError(f"{field} names layer {name}, but task.teacher has {len(depths)} teacher(s); {remedy}")
            if not 0 <= layer <= depths[teacher]:
                raise ValueError(f"{field} names layer {name}, which does not exist; {remedy}")
            if (teacher, layer) in seen:
                raise ValueError(f"{field} names layer {name} twice in {_shown(value)}; {remedy}")
            seen.add((teacher, layer))
    return tuple(tuple(layer_name(*layer_of(name)) for name in group) for group in value)


def map_groups(groups: Sequence[Sequence[Layer]], depths: Sequence[int], student_layers: int) -> StudentGroups:
    """Maps groups to a student's layers: layer i of a teacher with L layers becomes ``i student_layers / L``.

    Rounds half up, but never maps a Transformer layer to layer 0, the convolutional features (our choice). Layers of a
    group that map to the same student layer count once, also across teachers; two groups may share a student layer.
    With one teacher of equal depth the groups do not change.
    """

    def mapped(teacher: int, layer: int) -> int:
        nearest = (2 * layer * student_layers + depths[teacher]) // (2 * depths[teacher])
        return max(nearest, min(layer, 1))

    return tuple(tuple(dict.fromkeys(mapped(*layer_of(name)) for name in group)) for group in groups)


def parse_sharing(value: Any, num_groups: int, field: str = "criterion.projection_sharing") -> tuple[int, ...]:
    """Which projection each group uses.

    Args:
        value: "none" or None (one projection per group), "all" (one for all), or the projection's index for each
            group: in DPHuBERT layers 4, 8 and 12 share one, which is ``[0, 1, 1, 1]``.
        num_groups: number of groups.
        field: where the value comes from, for messages.

    Raises:
        ValueError: the value is none of these, or a list that skips an index.
    """
    if value is None or value == "none":
        return tuple(range(num_groups))
    if value == "all":
        return (0,) * num_groups
    remedy = f"give 'none', 'all', or {num_groups} indices from 0 without gaps, such as [0,1,1,1]"
    if not is_sequence(value) or len(value) != num_groups:
        raise ValueError(f"{field} is {_shown(value)}, which does not fit {num_groups} groups; {remedy}")
    if any(isinstance(index, bool) or not isinstance(index, int) for index in value):
        raise ValueError(f"{field} is {_shown(value)}, which are not all integers; {remedy}")
    if set(value) != set(range(max(value) + 1)):
        raise ValueError(f"{field} is {_shown(value)}, whose indices have gaps; {remedy}")
    return tuple(value)


def is_sequence(value: Any) -> bool:
    """Whether it is a list, a tuple or omegaconf's list; text is not."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _shown(value: Any) -> str:
    """A config value on one line, cut if long or deep; omegaconf's lists look like lists."""
    return _SHORT.repr(_plain(value))


def _plain(value: Any, depth: int = 0) -> Any:
    if not is_sequence(value):
        return value
    return [_plain(item, depth + 1) for item in value[:100]] if depth < 3 else "..."


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxstring, _SHORT.maxother = 3, 30, 100, 100
