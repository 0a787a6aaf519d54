"""Named waits of the host for the device: every copy to the host in a training step goes through here.

After a wait the device is idle until the host launches the next kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

WAITS = {
    "open gates": "before the teacher is launched: open units determine the shapes of the student's products",
    "losses": "after the last backward: an update whose loss is not finite is skipped, and its files are named",
    "norm": "also then: the same for gradients that are not finite; fairseq checks this again",
    "statistics": "after the optimizer's step: fairseq's meters would fetch about fifty numbers one by one",
}
"""Each wait of a training step and its reason."""


def to_host(tensor: Tensor, wait: str) -> Tensor:
    """A copy on the CPU (the tensor itself if it is already there).

    Args:
        wait: its name in :data:`WAITS`; a profile shows it as ``wait: NAME``.
    """
    assert wait in WAITS, wait
    with torch.autograd.profiler.record_function(f"wait: {wait}"):
        return tensor.cpu()


def numbers(outputs: Sequence[Mapping[str, Any]], wait: str) -> list[dict[str, Any]]:
    """The dictionaries with floats instead of scalar tensors, all fetched at once.

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
