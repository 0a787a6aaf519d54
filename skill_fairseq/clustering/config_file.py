"""Putting groups into a training config, every other character of which stays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from skill_fairseq.files import PathLike, atomic_write
from skill_fairseq.reading import decode

_SECTION = "criterion"
_FIELD = "groups"


def format_groups(groups: Sequence[Sequence[int]], separator: str = ", ") -> str:
    """One line that YAML, JSON and hydra's command line read alike: ``[[0], [1, 2]]``."""
    return "[" + separator.join("[" + separator.join(map(str, group)) + "]" for group in groups) + "]"


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


def merge_groups(text: str, groups: Sequence[Sequence[int]], name: str = "config") -> str:
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
    _, section = _entry(root, _SECTION)
    if not isinstance(section, yaml.MappingNode) or not section.value:
        raise ValueError(
            f"{name}: no '{_SECTION}:' section, expected the config of a distillation run; add one with "
            "'_name: skill_group_kd'"
        )
    if before[_SECTION].get("groups_file") not in (None, ""):
        raise ValueError(
            f"{name}: {_SECTION}.groups_file is {before[_SECTION]['groups_file']!r}, at odds with "
            f"{_SECTION}.{_FIELD}; remove that line"
        )
    key, value = _entry(section, _FIELD)
    line = format_groups(groups)
    after = _insert(text, section, line) if key is None else _replace(text, key, value, line)
    before[_SECTION][_FIELD] = [list(group) for group in groups]
    try:
        same = yaml.safe_load(after) == before
    except yaml.YAMLError:
        same = False
    if not same:
        raise ValueError(
            f"{name}: {_SECTION}.{_FIELD} is written in a way that cannot be replaced safely (an alias?); "
            f"set it by hand: {_FIELD}: {line}"
        )
    return after


def write_config(path: PathLike, text: str) -> None:
    """Replaces a config in one step; a link stays a link, and permissions stay."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(text.encode("utf-8"))


def _entry(mapping: Any, name: str) -> tuple[yaml.Node | None, yaml.Node | None]:
    """Key and value node of the last entry of that name (YAML's last one counts)."""
    if isinstance(mapping, yaml.MappingNode):
        for key, value in reversed(mapping.value):
            if key.value == name:
                return key, value
    return None, None


def _insert(text: str, section: yaml.MappingNode, line: str) -> str:
    """After ``_name``, else as the first entry."""
    first = section.value[0][0].start_mark
    if section.flow_style:
        return f"{text[: first.index]}{_FIELD}: {line}, {text[first.index :]}"
    newline = "\r\n" if "\r\n" in text else "\n"
    entry = f"{' ' * first.column}{_FIELD}: {line}{newline}"
    _, name = _entry(section, "_name")
    if name is None:
        start = first.index - first.column
        return text[:start] + entry + text[start:]
    end = text.find("\n", name.end_mark.index) + 1
    if end == 0:  # the last line, without a line break
        return text + newline + entry
    return text[:end] + entry + text[end:]


def _replace(text: str, key: yaml.Node, value: yaml.Node | None, line: str) -> str:
    assert value is not None
    if value.start_mark.index < key.end_mark.index:  # an alias: the value stands where its anchor is
        return text
    colon = text.index(":", key.end_mark.index) + 1
    between = text[colon : value.start_mark.index]
    kept = between.rstrip() if "#" in between else ""
    return f"{text[:colon]} {line}{kept}{text[_end(value) :]}"


def _end(node: yaml.Node) -> int:
    """Where a node's own text ends; the end that YAML gives a block includes the comments after it."""
    if isinstance(node, yaml.SequenceNode) and not node.flow_style and node.value:
        return _end(node.value[-1])
    end: int = node.end_mark.index
    return end
