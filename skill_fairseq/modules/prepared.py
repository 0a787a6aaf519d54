"""Weights laid out once, for encoders that no longer change."""

from __future__ import annotations

from typing import Any, Optional, Tuple

import torch
from torch import nn


def state_of(module: nn.Module) -> Any:
    """Identity and version of a module's parameters; equal as long as they do not change."""
    return [(p.data_ptr(), p.dtype, p.device, None if p.is_inference() else p._version) for p in module.parameters()]


class Prepared(nn.Module):
    """Base class of modules that can lay out their weights once for many forwards.

    The layout is used only while the weights are the same tensors with the same version: loading, moving, converting,
    optimizer steps and ``train()`` end it. Writes through ``.data`` are not detected. The layout is neither saved nor
    copied.
    """

    _prepared: Optional[Tuple[Any, Any]] = None  # state of the weights, layout
    _products: Optional[Tuple[Any, Any]] = None  # their layout, and products of frozen weights

    def layout(self) -> Any:
        """The weights in the form that the forward needs."""
        raise NotImplementedError

    def prepare(self, kernels: str = "plain") -> None:
        """Lays out the weights for later forwards.

        Args:
            kernels: allowed kernels, see :mod:`skill_fairseq.modules.kernels`, for modules that use them.
        """
        with torch.inference_mode(False), torch.no_grad():
            self._prepared = state_of(self), self.layout()

    def prepared(self) -> Any:
        """The stored layout, or a new one if it is outdated or gradients are needed."""
        needs_gradient = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        prepared = self._prepared  # another thread may delete or replace it
        if prepared is None or needs_gradient or prepared[0] != state_of(self):
            return self.layout()
        return prepared[1]

    def train(self, mode: bool = True) -> Prepared:
        """Also deletes the layout when training begins."""
        if mode:
            self._prepared = self._products = None
        return super().train(mode)

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()
        replica._prepared = replica._products = None
        return replica

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None, "_products": None}
