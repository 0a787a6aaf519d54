"""Numbers out of fairseq's training log, of log_format json or simple."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

Entry = dict[str, float]

KINDS = ("train_inner", "train", "valid")
_LINE = re.compile(r"(?:\[(?P<hydra>\w+)\]\[INFO\] - |\| INFO \| (?P<plain>\w+) \| )(?P<rest>.*)$")
_PAIR = re.compile(r"([A-Za-z_]\w*)[= ](-?(?:\d[\d.]*(?:e[+-]?\d+)?|inf|nan))(?=,|\s|$)")


def parse_log(text: str) -> dict[str, list[Entry]]:
    """The logged numbers of each kind, in the order of updates.

    A run that was interrupted goes on from its last checkpoint, and logs some updates twice: the later stay, and what
    was logged beyond the point of return is dropped.

    Args:
        text: of ``hydra_train.log`` or of the screen; other lines are passed over, and so are numbers that are not
            finite.

    Returns:
        "train_inner", "train" (means over epochs) and "valid" -> entries, each with ``num_updates``.
    """
    found: dict[str, list[Entry]] = {kind: [] for kind in KINDS}
    for line in text.splitlines():
        match = _LINE.search(line)
        kind = match and (match["hydra"] or match["plain"])
        if not match or kind not in found:
            continue
        entry = _numbers(match["rest"], str(kind))
        if "num_updates" not in entry:
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
            pairs = json.loads(rest).items()
        except json.JSONDecodeError:  # a line that was cut off, or a printed dictionary
            return {}
    else:
        pairs = _PAIR.findall(rest)
    prefix = f"{kind}_"
    entry = {}
    for name, value in pairs:
        try:
            number = float(str(value))
        except ValueError:
            continue
        if math.isfinite(number) and name != "epoch":
            entry[name[len(prefix) :] if name.startswith(prefix) and name != "train_wall" else name] = number
    return entry


def read_log(folder: Path) -> dict[str, list[Entry]]:
    """The log in a run's folder: ``hydra_train.log``, else ``log``, else the first ``*.log`` that has numbers.

    Returns:
        as :func:`parse_log`; no entries where there is no log.
    """
    candidates = [folder / "hydra_train.log", folder / "log", *sorted(folder.glob("*.log"))]
    for file in candidates:
        if file.is_file():
            found = parse_log(file.read_text(encoding="utf-8", errors="replace"))
            if any(found.values()):
                return found
    return {kind: [] for kind in KINDS}


def series(entries: Iterable[Entry], name: str) -> tuple[list[float], list[float]]:
    """Updates and the values of one name, of the entries that have it."""
    pairs = [(entry["num_updates"], entry[name]) for entry in entries if name in entry]
    return [update for update, _ in pairs], [value for _, value in pairs]
