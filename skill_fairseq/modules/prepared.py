"""Weights laid out once, for encoders that do not change any more."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import nn


class Prepared(nn.Module):
    """Base of modules that can lay their weights out ahead of many forwards.

    What was laid out is forgotten as soon as weights are loaded, moved, converted or trained again
    (``load_state_dict``, ``to``, ``train``), and is neither saved nor copied.
    """

    _prepared: Optional[Any] = None

    def layout(self) -> Any:
        """The weights as the forward wants them."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Lays the weights out for the forwards to come. Do not write into them afterwards."""
        with torch.no_grad():
            self._prepared = self.layout()

    def prepared(self) -> Any:
        """What was laid out, or, where nothing was or gradients are asked for, a fresh layout."""
        if self._prepared is None or (torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())):
            return self.layout()
        return self._prepared

    def train(self, mode: bool = True) -> Prepared:
        """Also forgets the layout where training begins."""
        if mode:
            self._prepared = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._prepared = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._prepared = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}
