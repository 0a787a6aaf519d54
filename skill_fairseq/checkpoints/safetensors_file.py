"""safetensors files: tensors and strings, without code."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

PIECE = 1 << 26
"""Bytes to read before the file is reopened."""


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Reads every tensor of the file onto the CPU, into its own memory.

    The file is mapped, and the pages read count as memory until it is closed; reopening it regularly keeps the peak at
    the file's size.

    Raises:
        ValueError: the file is truncated, damaged or not safetensors.
    """
    found: dict[str, Tensor] = {}
    try:
        with safe_open(str(path), framework="pt") as file:
            names = list(file.keys())
        while len(found) < len(names):
            read = 0
            with safe_open(str(path), framework="pt") as file:
                for name in names[len(found) :]:
                    found[name] = file.get_tensor(name).clone()
                    read += found[name].numel() * found[name].element_size()
                    if read > PIECE:
                        break
    except SafetensorError as error:
        raise _damaged(path, error) from error
    return found


def load_metadata(path: Path) -> dict[str, str]:
    """The strings in the file's header.

    Raises:
        ValueError: the file is truncated, damaged or not safetensors.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path}: is truncated, damaged or not a safetensors file ({error}); its size is "
        f"{path.stat().st_size:,} bytes: compare with the original and download it again"
    )
