"""fairseq's data-parallel backends: refuses those that cannot train a student, and makes the others exact."""

from __future__ import annotations

from typing import Any, Callable, Dict, List

import torch
from fairseq.distributed import LegacyDistributedDataParallel
from torch import nn
from torch.nn.parallel import DistributedDataParallel

REFUSED = {
    "fully_sharded": "it keeps parameters as flat pieces on different ranks, but gates and sizes need whole ones",
    "slowmo": "its ranks train separately between averages, but gates and multipliers must stay equal",
}
"""Refused values of ``distributed_training.ddp_backend``, and the reason."""


def check_backend(cfg: Any, use_bmuf: bool = False) -> None:
    """Refuses backends that would not train a single student.

    Args:
        cfg: ``distributed_training``.
        use_bmuf: ``optimization.use_bmuf``.

    Raises:
        ValueError: names the field, the reason and the remedy.
    """
    backend = str(getattr(cfg.ddp_backend, "value", cfg.ddp_backend))
    if backend in REFUSED:
        raise ValueError(
            f"distributed_training.ddp_backend: {backend}, but {REFUSED[backend]}; expected legacy_ddp, as in the "
            "recipes, or pytorch_ddp"
        )
    if use_bmuf:
        raise ValueError(f"optimization.use_bmuf: true, but {REFUSED['slowmo']}; leave it out")


def refusing(fsdp_enable_wrap: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """fairseq's context for ``fully_sharded``, which would require fairscale first."""

    def checked(cfg: Any) -> Any:
        check_backend(cfg)
        return fsdp_enable_wrap(cfg)

    return checked


class DistributedAnywhere(DistributedDataParallel):
    """torch's DDP, as fairseq builds it for ``pytorch_ddp``, but also for CPUs, where a device number is an error."""

    def __init__(self, module: nn.Module, device_ids: Any = None, output_device: Any = None, **settings: Any) -> None:
        if next(module.parameters()).device.type == "cpu":
            device_ids = output_device = None
        super().__init__(module, device_ids=device_ids, output_device=output_device, **settings)


class DistributedByType(LegacyDistributedDataParallel):
    """``legacy_ddp`` and ``no_c10d``, with a separate buffer for each parameter dtype.

    fairseq sums all gradients in one buffer of the first parameter's dtype: in a half-precision model, float32
    gradients of gates and multipliers would be rounded to half precision, or overflow.
    """

    def __init__(self, module: Any, process_group: Any, buffer_size: int = 2**28) -> None:
        super().__init__(module, process_group, buffer_size)
        by_type: Dict[Any, List[torch.nn.Parameter]] = {}
        for parameter in module.parameters():
            by_type.setdefault((parameter.device, parameter.dtype), []).append(parameter)
        self._by_type = list(by_type.values())
        self._buffers_by_type: List[Any] = [None] * len(self._by_type)

    def all_reduce_grads(self) -> None:
        """Like fairseq's, for one dtype after the other."""
        if self.accumulate_grads:
            return
        for i, parameters in enumerate(self._by_type):
            if self._buffers_by_type[i] is None:
                size = min(self.buffer_size, sum(p.numel() for p in parameters))
                self._buffers_by_type[i] = parameters[0].new_empty(size)
            self.buffer, self.per_device_params = self._buffers_by_type[i], [parameters]
            super().all_reduce_grads()
