"""Putting groups into a training config, every other character of which stays."""

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
    """One line that YAML, JSON and hydra's command line read alike: ``[[0], [1, 2, "1/2"]]``."""
    return "[" + separator.join("[" + separator.join(map(json.dumps, group)) + "]" for group in groups) + "]"


def read_config(path: PathLike) -> str:
    """The text of a config, line endings as they are.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not UTF-8.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such config; name the YAML file of a training run")
    return decode(file.read_bytes(), file)


def merge_groups(text: str, groups: Sequence[Sequence[Layer]], name: str = "config") -> str:
    """A training config with its ``criterion.groups`` replaced, or put in where there is none.

    All other text stays, comments included; comments between the lines of a replaced list go with it. The
    result is parsed again: if anything but the groups has changed, that is an error.

    Args:
        text: the YAML config.
        groups: layers of each group.
        name: of the file, for messages.

    Raises:
        ValueError: not YAML, no ``criterion`` section to hold groups, groups in a ``groups_file`` too, or a
            notation that cannot be edited safely.
    """
    try:
        before, root = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: is no YAML that can be read ({error}); correct it") from error
    section = _entries(root).get("criterion", (None, None))[1]
    if not _entries(section):
        raise ValueError(
            f"{name}: no 'criterion:' section, expected the config of a distillation run; add one with "
            "'_name: skill_group_kd'"
        )
    if before["criterion"].get("groups_file") not in (None, ""):
        raise ValueError(
            f"{name}: criterion.groups_file is {before['criterion']['groups_file']!r}, at odds with criterion.groups; "
            "remove that line"
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
    """Key and value node by the key; of equal keys the last counts, as YAML says."""
    if not isinstance(mapping, yaml.MappingNode):
        return {}
    return {key.value: (key, value) for key, value in mapping.value if isinstance(key, yaml.ScalarNode)}


def _edited(text: str, section: Any, line: str) -> str:
    """The text with the groups of a section replaced, or put before its first entry."""
    if "groups" not in _entries(section):
        first = section.value[0][0].start_mark
        newline = "\r\n" if "\r\n" in text else "\n"
        separator = ", " if section.flow_style else newline + " " * first.column
        return f"{text[: first.index]}groups: {line}{separator}{text[first.index :]}"
    key, value = _entries(section)["groups"]
    if value.start_mark.index < key.end_mark.index:  # an alias: the value stands where its anchor is
        return text
    colon = text.index(":", key.end_mark.index) + 1
    between = text[colon : value.start_mark.index]
    comments = between.rstrip() if "#" in between else ""
    return f"{text[:colon]} {line}{comments}{text[_end(value) :]}"


def _end(node: yaml.Node) -> int:
    """Where a node's own text ends; the end that YAML gives a block includes the comments after it."""
    if isinstance(node, yaml.SequenceNode) and not node.flow_style and node.value:
        return _end(node.value[-1])
    return int(node.end_mark.index)
