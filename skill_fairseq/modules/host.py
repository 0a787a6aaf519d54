"""Where the host waits for the device: every copy to the host in a training step goes through here, by name.

A wait lets the device run dry: it has nothing to do until the host has launched the next kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

WAITS = {
    "open gates": "before the teacher is launched: which units are open decides the shapes of the student's products",
    "losses": "after the last backward: an update whose loss is not finite is skipped, and its files are named",
    "norm": "then: so is one whose gradients are not finite; fairseq asks the same once more",
    "statistics": "after the optimizer's step: fairseq's meters would fetch some fifty numbers one by one",
}
"""Each wait of a training step and its reason."""


def to_host(tensor: Tensor, wait: str) -> Tensor:
    """A copy on the CPU (the tensor itself if it is there).

    Args:
        wait: its name in :data:`WAITS`; a profile shows it as ``wait: NAME``.
    """
    assert wait in WAITS, wait
    with torch.autograd.profiler.record_function(f"wait: {wait}"):
        return tensor.cpu()


def numbers(outputs: Sequence[Mapping[str, Any]], wait: str) -> list[dict[str, Any]]:
    """The dictionaries with floats in place of scalar tensors, which are all fetched at once.

    Args:
        wait: its name in :data:`WAITS`.
    """
    tensors = [value for output in outputs for value in output.values() if isinstance(value, Tensor)]
    if not tensors:
        return [dict(output) for output in outputs]
    device = next((t.device for t in tensors if t.device.type != "cpu"), tensors[0].device)
    stacked = torch.stack([t.detach().to(device, torch.float64).reshape(()) for t in tensors])
    values = iter(to_host(stacked, wait).tolist())
    return [{k: next(values) if isinstance(v, Tensor) else v for k, v in output.items()} for output in outputs]
