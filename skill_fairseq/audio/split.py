"""Divides recordings into training, validation and test."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

SPEAKER = r"([^/]+)/[^/]+/[^/]+$"
"""SPEAKER/CHAPTER/FILE, as in LibriSpeech and VoxCeleb."""


def keys_of(paths: Sequence[str], split_by: str, speaker: str = SPEAKER) -> list[str]:
    """A key for each recording; recordings with the same key stay in the same split.

    Args:
        paths: relative paths.
        split_by: "file", "folder" (the file's folder), or "speaker".
        speaker: regular expression that finds the speaker in a path: its first group, or else the whole match.

    Raises:
        ValueError: a path has no speaker.
    """
    if split_by == "file":
        return list(paths)
    if split_by == "folder":
        return [path.rpartition("/")[0] for path in paths]
    pattern = re.compile(speaker)
    keys = []
    for path in paths:
        found = pattern.search(path)
        if found is None:
            raise ValueError(
                f"--split-by speaker: {path!r} has no speaker for the pattern {speaker!r}; give another --speaker, or "
                "--split-by folder"
            )
        keys.append((pattern.groups and found[1]) or found[0])
    return keys


def split(keys: Sequence[str], percents: dict[str, float], seed: int) -> dict[str, list[int]]:
    """Divides recordings by the rank of a seeded hash of their key, so that equal keys stay together.

    Args:
        keys: key of each recording, for example its relative path.
        percents: per cent of the recordings in each split but `train`, which gets the rest; as close as whole keys
            allow, and at least one key.
        seed: another seed, another split.

    Returns:
        sorted indices into `keys` of each split; `train` comes first.

    Raises:
        ValueError: nothing is left for `train`.
    """
    members: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        members.setdefault(key, []).append(index)
    ranks = {key: hashlib.sha256(f"{seed}\t{key}".encode("utf-8", "surrogateescape")).digest() for key in members}
    order = sorted(members, key=lambda key: ranks[key])
    shares: dict[str, list[int]] = {"train": []}
    for name, percent in percents.items():
        wanted = len(keys) * percent / 100
        share: list[int] = []
        while order and percent > 0 and (not share or _nearer(len(share), len(members[order[0]]), round(wanted))):
            share += members[order.pop(0)]
        shares[name] = sorted(share)
    if not order:
        raise ValueError(
            f"--valid-percent, --test-percent: {len(keys)} usable recordings ({len(members)} that may be separated) "
            "leave none for train.tsv, expected at least one; lower the percentages, add audio, or split by something "
            "smaller"
        )
    shares["train"] = sorted(index for key in order for index in members[key])
    return shares


def _nearer(count: int, more: int, wanted: int) -> bool:
    return abs(count + more - wanted) < abs(count - wanted)
