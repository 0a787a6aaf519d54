"""safetensors files: tensors and a few strings, nothing that could run."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor


def looks_like_safetensors(head: bytes) -> bool:
    """Whether a file that begins with these bytes (nine or more) is meant as safetensors."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of the file, on the CPU.

    Raises:
        ValueError: the file is truncated, damaged or something else.
    """
    try:
        return load_file(str(path))
    except SafetensorError as error:
        raise _damaged(path, error) from error


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
