"""TF32: float32 matrix products on tensor cores (Ampere and later), with inputs rounded to 11 bits."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

_lock = threading.Lock()


def allow_tf32(allowed: bool) -> None:
    """Enables TF32 for all products and convolutions of this process on NVIDIA GPUs.

    torch's default allows it only for convolutions. Do not call it without a GPU: torch < 2.9 has one setting for both
    kinds of device, and CPUs may then round too.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Forces full float32 for float32 matrix products on this device inside the block."""
    if device.type != "cuda" or not torch.backends.cuda.matmul.allow_tf32:
        yield
        return
    with _lock:  # two threads would restore each other's setting
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = True
