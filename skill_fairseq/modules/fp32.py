"""Parameters that stay float32 in mixed precision."""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch import nn


class Float32Module(nn.Module):
    """Base class of modules whose own parameters and buffers stay float32 and belong to an optimizer group.

    ``half()``, ``bfloat16()``, ``double()`` and ``to(dtype)`` on this module, or on a parent, move it between
    devices but do not change the dtype: float16 would turn ``1 - 1e-6`` into 1, and overflows for model sizes.

    Every own parameter has the attribute ``param_group``, from which fairseq's ``composite`` optimizer chooses a
    learning rate; it survives conversion, copying and loading.
    """

    param_group: str

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        self._tag_parameters()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._tag_parameters()  # copies of a Parameter lose attributes

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any) -> Float32Module:
        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            converted = fn(tensor)
            # From the original, because a round trip through lower precision would round it.
            return converted if converted.dtype == tensor.dtype else tensor.to(converted.device)

        super()._apply(keep_dtype, *args, **kwargs)
        self._tag_parameters()
        return self

    def _tag_parameters(self) -> None:
        for parameter in self.parameters(recurse=False):
            parameter.param_group = self.param_group  # type: ignore[attr-defined]
