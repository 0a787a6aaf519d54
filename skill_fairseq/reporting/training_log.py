"""Reads numbers from fairseq's training log, log_format json or simple."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

Entry = dict[str, float]

LOGGED = ("train_inner", "train", "valid")
_LINE = re.compile(r"(?:\[(?P<hydra>\w+)\]\[INFO\] - |\| INFO \| (?P<plain>\w+) \| )(?P<rest>.*)$")
_SEPARATORS = str.maketrans("=,|", "   ")
_LONGEST = 100_000  # characters; lines with numbers are shorter


def parse_log(lines: Iterable[str]) -> dict[str, list[Entry]]:
    """The logged numbers of each kind, in update order.

    A resumed run starts from its last checkpoint and logs some updates twice: the later entries count, and entries
    logged after that checkpoint before the interruption are dropped.

    Args:
        lines: lines of ``hydra_train.log`` or of the screen; those without numbers are skipped.

    Returns:
        "train_inner", "train" (means over epochs) and "valid" -> entries, each with ``num_updates``. Other numbers may
        be NaN or infinite.
    """
    found: dict[str, list[Entry]] = {kind: [] for kind in LOGGED}
    for line in lines:
        match = _LINE.search(line) if "num_updates" in line and len(line) < _LONGEST else None
        kind = match and (match["hydra"] or match["plain"])
        if not match or kind not in found:
            continue
        entry = _numbers(match["rest"], str(kind))
        if not math.isfinite(entry.get("num_updates", math.nan)):
            continue
        entries = found[str(kind)]
        while entries and entries[-1]["num_updates"] >= entry["num_updates"]:
            entries.pop()
        entries.append(entry)
    return found


def _numbers(rest: str, kind: str) -> Entry:
    pairs: Iterable[tuple[str, object]]
    if rest.lstrip().startswith("{"):
        try:
            pairs = [(name, value) for name, value in json.loads(rest).items() if isinstance(value, (str, int, float))]
        except (ValueError, RecursionError):  # a truncated line, or a printed dictionary
            return {}
    else:  # name=value, or | name value |
        words = rest.translate(_SEPARATORS).split()
        pairs = [(name, value) for name, value in zip(words, words[1:]) if name.isidentifier()]
    prefix = f"{kind}_"
    entry = {}
    for name, value in pairs:
        try:
            number = float(str(value))
        except ValueError:
            continue
        if name != "epoch":
            entry[name[len(prefix) :] if name.startswith(prefix) and name != "train_wall" else name] = number
    return entry


def read_log(folder: Path) -> dict[str, list[Entry]]:
    """Parses the log in a run's folder: ``hydra_train.log``, else ``log``, where the examples keep the screen's output.

    Returns:
        see :func:`parse_log`; no entries without a log.
    """
    for file in (folder / "hydra_train.log", folder / "log"):
        if file.is_file():
            with open(file, encoding="utf-8", errors="replace") as lines:
                found = parse_log(lines)
            if any(found.values()):
                return found
    return {kind: [] for kind in LOGGED}


def series(entries: Iterable[Entry], name: str) -> tuple[list[float], list[float]]:
    """Updates and values of one name, where it is finite."""
    pairs = [(entry["num_updates"], entry[name]) for entry in entries if math.isfinite(entry.get(name, math.nan))]
    return [update for update, _ in pairs], [value for _, value in pairs]
