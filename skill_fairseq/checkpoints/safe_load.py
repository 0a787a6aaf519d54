"""Reads untrusted torch files: error messages, and configurations as plain values."""

from __future__ import annotations

import argparse
import enum
import inspect
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from skill_fairseq.checkpoints.unpickling import Placeholder, Refused, read

TRUST = (
    "allow it with --trust (skill-export, skill-info, skill-shrink, skill-cluster) or trust=True (load_encoder); for "
    "everything else, training too, skill-export --trust FILE encoder.safetensors writes a file without such objects"
)
"""How to read a file from a trusted source, in commands, in Python and in training."""

MAX_VALUES = 200_000
MAX_DEPTH = 50
"""Limits of a configuration: values and characters, and depth of nesting."""


def load_torch_file(path: Path, trust: bool = False) -> Any:
    """Reads a file of ``torch.save`` onto the CPU.

    Args:
        path: the file.
        trust: read any pickled class, which can run its author's code.

    Returns:
        the saved object; instances of harmless classes become :class:`Placeholder` (see :func:`plain`).

    Raises:
        ValueError: the file is truncated, damaged or not a torch file, or holds an object of an unknown class.
    """
    kind = None
    try:
        kind = _other_archive(path)
        if kind is None and trust:
            return torch.load(path, map_location="cpu", **_everything())
        if kind is None:
            with open(path, "rb") as file:
                return read(file)
    except OSError:
        raise
    except Refused as error:
        raise ValueError(
            f"{path}: holds an object of class {error.name}, which is not read from an untrusted file because it could "
            f"run code; if you trust its source, {TRUST}"
        ) from error
    except Exception as error:  # damaged pickles raise almost anything
        if trust and isinstance(error, (ImportError, AttributeError)):
            raise ValueError(f"{path}: a class in it cannot be imported ({error}); install it") from error
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"{path}: is truncated, damaged or not a torch checkpoint ({reason}); expected a file of "
            "torch.save: compare its size or checksum with the original and download it again"
        ) from error
    raise ValueError(f"{path}: is {kind}; expected a checkpoint written by torch.save")


def _everything() -> dict[str, bool]:
    """The argument that makes torch.load read any pickle; torch < 1.13 always does, and has no argument."""
    return {"weights_only": False} if "weights_only" in inspect.signature(torch.load).parameters else {}


def _other_archive(path: Path) -> str | None:
    """The kind of a zip file that is not torch's, in words; None for torch's and for all other files.

    Raises:
        ValueError, zipfile.BadZipFile: it is damaged.
    """
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            return None
    if not zipfile.is_zipfile(path):
        raise ValueError(f"its end is missing: it is truncated at {path.stat().st_size:,} bytes")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    members = {name.split("/", 1)[-1] for name in names}
    if "constants.pkl" in members:
        return "a TorchScript program"
    return None if "data.pkl" in members else f"a zip archive of {names[:3]}"


def plain(value: Any) -> Any:
    """Converts configurations of any kind to dictionaries, lists and plain values.

    Takes mappings, sequences, namespaces, omegaconf containers and their placeholders.

    Raises:
        ValueError: it has more than :data:`MAX_VALUES` or is deeper than :data:`MAX_DEPTH`, like lists in a cycle.
    """
    left = MAX_VALUES

    def walk(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1 + (len(value) if isinstance(value, (str, bytes)) else 0)
        if left < 0 or depth > MAX_DEPTH:
            raise ValueError(f"a configuration is larger than {MAX_VALUES:,} values or deeper than {MAX_DEPTH} levels")
        if isinstance(value, enum.Enum):
            return value.name
        if isinstance(value, argparse.Namespace):
            return walk(vars(value), depth)
        if isinstance(value, Placeholder):
            fields = vars(value)
            inner = next((name for name in ("_content", "_val") if name in fields), None)
            return walk(fields if inner is None else fields[inner], depth + 1)  # omegaconf's containers and leaves
        if isinstance(value, Mapping):
            return {key: walk(item, depth + 1) for key, item in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
            return [walk(item, depth + 1) for item in value]
        return value.item() if isinstance(value, np.generic) else value

    return walk(value, 0)
