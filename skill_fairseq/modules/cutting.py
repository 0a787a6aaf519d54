"""Leaving some outputs or inputs of a layer in the state of an encoder."""

from __future__ import annotations

from typing import Any, Dict, List

from torch import Tensor, nn

State = Dict[str, Tensor]


def cut_outputs(state: State, name: str, layer: nn.Module, kept: Tensor) -> None:
    """Leaves some outputs of a linear map or convolution.

    Args:
        state: changed in place.
        name: path of the layer.
        layer: the layer. One that stands in for a linear layer lists in ``outputs`` its parameters that have its
            outputs first, and in ``inputs`` those that have its inputs second.
        kept: (k,) indices.
    """
    for key in keys_of(state, name, getattr(layer, "outputs", ("weight", "bias"))):
        state[key] = state[key][kept]


def cut_inputs(state: State, name: str, layer: nn.Module, kept: Tensor, factor: Tensor) -> None:
    """Leaves some inputs of a linear map or convolution, each times its factor (k,); as :func:`cut_outputs`."""
    for key in keys_of(state, name, getattr(layer, "inputs", ("weight",))):
        weight = state[key][:, kept]
        state[key] = weight * factor.view(-1, *[1] * (weight.dim() - 2))


def keys_of(state: State, name: str, parameters: Any) -> List[str]:
    """Those of a layer's parameters that the state has, by their full names."""
    return [key for key in (f"{name}.{parameter}" for parameter in parameters) if key in state]
