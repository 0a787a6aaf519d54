"""safetensors files: tensors and a few strings, nothing that could run."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

PIECE = 1 << 26
"""Bytes that are read between an opening and a closing of the file."""


def looks_like_safetensors(head: bytes) -> bool:
    """Whether a file that begins with these bytes (nine or more) is meant as safetensors."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of the file, on the CPU, in memory of its own.

    The file is mapped, and what has been read of it counts as memory until it is closed: it is opened again and
    again, so that the peak is the file's size.

    Raises:
        ValueError: the file is truncated, damaged or something else.
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
        ValueError: the file is truncated, damaged or something else.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path}: is truncated, damaged or no safetensors file ({error}); its size is "
        f"{path.stat().st_size:,} bytes: compare with the original and fetch it again"
    )
