"""Writes groups into a training config without changing any other character."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from skill_fairseq.files import PathLike
from skill_fairseq.objectives.groups import Layer
from skill_fairseq.reading import decode


def format_groups(groups: Sequence[Sequence[Layer]], separator: str = ", ") -> str:
    """One line that means the same in YAML, JSON and on hydra's command line: ``[[0], [1, 2, "1/2"]]``."""
    return "[" + separator.join("[" + separator.join(map(json.dumps, group)) + "]" for group in groups) + "]"


def read_config(path: PathLike) -> str:
    """Reads the text of a config with its line endings.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not UTF-8.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such config; name the YAML file of a training run")
    return decode(file.read_bytes(), file)


def merge_groups(text: str, groups: Sequence[Sequence[Layer]], name: str = "config") -> str:
    """Replaces ``criterion.groups`` in a training config, or inserts it.

    All other text stays, including comments, except those between the lines of a replaced list. The result is parsed
    again; a change of anything but the groups is an error.

    Args:
        text: the YAML config.
        groups: layers of each group.
        name: the file's name, for messages.

    Raises:
        ValueError: it is not YAML, has no ``criterion`` section, also has a ``groups_file``, or its notation cannot be
            edited safely.
    """
    try:
        before, root = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: is not valid YAML ({error}); correct it") from error
    section = _entries(root).get("criterion", (None, None))[1]
    if not _entries(section):
        raise ValueError(
            f"{name}: no 'criterion:' section, expected the config of a distillation run; add one with "
            "'_name: skill_group_kd'"
        )
    if before["criterion"].get("groups_file") not in (None, ""):
        raise ValueError(
            f"{name}: criterion.groups_file is {before['criterion']['groups_file']!r}, which conflicts with "
            "criterion.groups; remove that line"
        )
    line = format_groups(groups)
    after = _edited(text, section, line)
    before["criterion"]["groups"] = [list(group) for group in groups]
    try:
        same = yaml.safe_load(after) == before
    except yaml.YAMLError:
        same = False
    if not same:
        raise ValueError(
            f"{name}: criterion.groups is written in a way that cannot be replaced safely (an alias?); set it by hand: "
            f"groups: {line}"
        )
    return after


def _entries(mapping: Any) -> dict[str, tuple[yaml.Node, yaml.Node]]:
    """Key and value nodes by key; the last of equal keys counts, as in YAML."""
    if not isinstance(mapping, yaml.MappingNode):
        return {}
    return {key.value: (key, value) for key, value in mapping.value if isinstance(key, yaml.ScalarNode)}


def _edited(text: str, section: Any, line: str) -> str:
    """Replaces the groups of a section, or inserts them before its first entry."""
    if "groups" not in _entries(section):
        first = section.value[0][0].start_mark
        newline = "\r\n" if "\r\n" in text else "\n"
        separator = ", " if section.flow_style else newline + " " * first.column
        return f"{text[: first.index]}groups: {line}{separator}{text[first.index :]}"
    key, value = _entries(section)["groups"]
    if value.start_mark.index < key.end_mark.index:  # an alias: the value is at its anchor
        return text
    colon = text.index(":", key.end_mark.index) + 1
    between = text[colon : value.start_mark.index]
    comments = between.rstrip() if "#" in between else ""
    return f"{text[:colon]} {line}{comments}{text[_end(value) :]}"


def _end(node: yaml.Node) -> int:
    """End of a node's own text; YAML's end of a block includes the comments after it."""
    if isinstance(node, yaml.SequenceNode) and not node.flow_style and node.value:
        return _end(node.value[-1])
    return int(node.end_mark.index)
