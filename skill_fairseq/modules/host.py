"""Where the host waits for the device: every copy to the host in a training step goes through here, by name.

A wait lets the device run dry: it has nothing to do until the host has launched the next kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

WAITS = {
    "open gates": "before the teacher is launched: which units are open decides the shapes of the student's products",
    "losses": "after the last backward: an update whose loss is not finite is skipped, and its files are named",
}
"""Each wait of a training step and its reason. fairseq itself waits once more, for the norm of the gradients."""


def to_host(tensor: Tensor, wait: str) -> Tensor:
    """A copy on the CPU (the tensor itself if it is there).

    Args:
        wait: its name in :data:`WAITS`; a profile shows it as ``wait: NAME``.
    """
    assert wait in WAITS, wait
    with torch.autograd.profiler.record_function(f"wait: {wait}"):
        return tensor.cpu()
