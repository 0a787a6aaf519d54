"""When to take the plain path: textbook operations that torch can export, and fast ones are tested against."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import torch

_plain: contextvars.ContextVar[bool] = contextvars.ContextVar("plain", default=False)  # each thread has its own


@contextlib.contextmanager
def plain_path(enabled: bool = True) -> Iterator[None]:
    """Inside, encoders compute by textbook operations: masked gates, ``conv1d``, one attention matrix a head."""
    token = _plain.set(enabled)
    try:
        yield
    finally:
        _plain.reset(token)


def exporting() -> bool:
    """Whether torch is recording the model: ``torch.export``, ONNX or TorchScript tracing."""
    compiler = getattr(torch, "compiler", None)
    is_exporting = getattr(compiler, "is_exporting", None)
    return bool(
        (is_exporting is not None and is_exporting()) or torch.onnx.is_in_onnx_export() or torch.jit.is_tracing()
    )


def use_plain() -> bool:
    """Whether the plain path is to be taken."""
    return _plain.get() or exporting()
