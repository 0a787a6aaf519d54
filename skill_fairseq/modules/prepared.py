"""Weights laid out once, for encoders that do not change any more."""

from __future__ import annotations

from typing import Any, Optional, Tuple

import torch
from torch import nn


def state_of(module: nn.Module) -> Any:
    """Which tensors a module's parameters are, and how often they were changed; equal while they are the same."""
    return [(p.data_ptr(), p.dtype, p.device, None if p.is_inference() else p._version) for p in module.parameters()]


class Prepared(nn.Module):
    """Base of modules that can lay their weights out ahead of many forwards.

    What was laid out is used only while the weights are the same tensors and torch has counted no change in them:
    loading, moving, converting and optimizer steps all end it, and so does ``train()``. Writes through
    ``.data`` are not detected. The layout is neither saved nor copied.
    """

    _prepared: Optional[Tuple[Any, Any]] = None  # state of the weights, layout
    _products: Optional[Tuple[Any, Any]] = None  # the layout that they are of, and products of frozen weights

    def layout(self) -> Any:
        """The weights as the forward wants them."""
        raise NotImplementedError

    def prepare(self, kernels: str = "plain") -> None:
        """Lays the weights out for the forwards to come.

        Args:
            kernels: what may multiply, see :mod:`skill_fairseq.modules.kernels`; for modules that heed it.
        """
        with torch.inference_mode(False), torch.no_grad():
            self._prepared = state_of(self), self.layout()

    def prepared(self) -> Any:
        """What was laid out, or, where that is outdated or gradients are asked for, a fresh layout."""
        needs_gradient = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        prepared = self._prepared  # another thread may forget it, or make it again
        if prepared is None or needs_gradient or prepared[0] != state_of(self):
            return self.layout()
        return prepared[1]

    def train(self, mode: bool = True) -> Prepared:
        """Also forgets the layout where training begins."""
        if mode:
            self._prepared = self._products = None
        return super().train(mode)

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()
        replica._prepared = replica._products = None
        return replica

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None, "_products": None}
