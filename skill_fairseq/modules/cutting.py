"""Cuts outputs or inputs of a layer in an encoder's state dict."""

from __future__ import annotations

from typing import Any, Dict, List

from torch import Tensor, nn

State = Dict[str, Tensor]


def cut_outputs(state: State, name: str, layer: nn.Module, kept: Tensor) -> None:
    """Keeps some outputs of a linear map or convolution.

    Args:
        state: changed in place.
        name: path of the layer.
        layer: the layer. One that replaces a linear layer lists in ``outputs`` its parameters whose first dimension is
            the outputs, and in ``inputs`` those whose second dimension is the inputs.
        kept: (k,) indices.
    """
    for key in keys_of(state, name, getattr(layer, "outputs", ("weight", "bias"))):
        state[key] = state[key][kept]


def cut_inputs(state: State, name: str, layer: nn.Module, kept: Tensor, factor: Tensor) -> None:
    """Keeps some inputs of a linear map or convolution, each times its factor (k,); see :func:`cut_outputs`."""
    for key in keys_of(state, name, getattr(layer, "inputs", ("weight",))):
        weight = state[key][:, kept]
        state[key] = weight * factor.view(-1, *[1] * (weight.dim() - 2))


def keys_of(state: State, name: str, parameters: Any) -> List[str]:
    """The layer's parameters in the state, by full name."""
    return [key for key in (f"{name}.{parameter}" for parameter in parameters) if key in state]
