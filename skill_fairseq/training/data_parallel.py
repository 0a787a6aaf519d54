"""fairseq's own data-parallel wrapper, made exact for models whose parameters have several types."""

from __future__ import annotations

from typing import Any, Dict, List

import torch
from fairseq.distributed import LegacyDistributedDataParallel


class DistributedByType(LegacyDistributedDataParallel):
    """``legacy_ddp`` and ``no_c10d``, with a buffer of its own for each type of parameter.

    fairseq adds up all gradients in one buffer of the first parameter's type: float32 gradients of gates and
    multipliers in a half-precision model would be rounded to half, or overflow.
    """

    def __init__(self, module: Any, process_group: Any, buffer_size: int = 2**28) -> None:
        super().__init__(module, process_group, buffer_size)
        by_type: Dict[Any, List[torch.nn.Parameter]] = {}
        for parameter in module.parameters():
            by_type.setdefault((parameter.device, parameter.dtype), []).append(parameter)
        self._by_type = list(by_type.values())
        self._buffers_by_type: List[Any] = [None] * len(self._by_type)

    def all_reduce_grads(self) -> None:
        """fairseq's, for one type after the other."""
        if self.accumulate_grads:
            return
        for i, parameters in enumerate(self._by_type):
            if self._buffers_by_type[i] is None:
                size = min(self.buffer_size, sum(p.numel() for p in parameters))
                self._buffers_by_type[i] = parameters[0].new_empty(size)
            self.buffer, self.per_device_params = self._buffers_by_type[i], [parameters]
            super().all_reduce_grads()
