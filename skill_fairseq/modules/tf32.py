"""TF32: products of float32 matrices by tensor cores (Ampere and later), of numbers rounded to 11 bits."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

_lock = threading.Lock()


def allow_tf32(allowed: bool) -> None:
    """For all products and convolutions of this process on NVIDIA GPUs.

    torch's own default allows it only for convolutions. Where there is no GPU, do not call it: torch < 2.9 keeps one
    setting for both kinds of device, and CPUs too may round then.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Inside, products of float32 matrices on this device are float32 whatever else is allowed."""
    if device.type != "cuda" or not torch.backends.cuda.matmul.allow_tf32:
        yield
        return
    with _lock:  # two threads would restore what the other has set
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = True
