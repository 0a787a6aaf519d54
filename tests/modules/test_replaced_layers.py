"""Encoders whose linear layers a tool has replaced, by quantised layers or adapters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skill_fairseq.modules.encoder import SpeechEncoder
from tests.conftest import LARGE_STYLE, random_encoder
from tests.modules.test_fast_path import UNITS, set_gates

STYLES: dict[str, dict[str, Any]] = {
    "wavlm": {},
    "large": LARGE_STYLE,
    "shrunk": {"heads": [[0, 2], [], [1]], "ffn_dims": [5, 48, 0], "conv_channels": [16, 16, 16, 16, 16, 16, 9]},
}


class Adapter(nn.Module):
    """A typical adapter: the old layer plus another branch; here twice the old layer less itself."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.inner = layer
        self.in_features = layer.in_features

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x) - self.inner(x)


def with_adapters(encoder: SpeechEncoder) -> SpeechEncoder:
    adapted = copy.deepcopy(encoder)
    for module in list(adapted.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and not isinstance(module, Adapter):
                setattr(module, name, Adapter(child))
    return adapted


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("gates", [True, False])
@pytest.mark.parametrize("style", STYLES)
def test_the_module_in_a_layers_place_is_what_computes(style: str, gates: bool, gradients: bool) -> None:
    encoder = random_encoder(**STYLES[style], pruning_units=UNITS if gates else []).double()
    if gates:
        set_gates(encoder, 0.0)
    source = torch.randn(2, 4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.set_grad_enabled(gradients):
        wanted, found = encoder(source), with_adapters(encoder)(source)
    for state, right in zip(found.hidden_states, wanted.hidden_states):
        torch.testing.assert_close(state, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gates", [True, False])
@pytest.mark.parametrize("style", STYLES)
def test_dynamic_quantisation_of_linear_layers(style: str, gates: bool) -> None:
    encoder = random_encoder(**STYLES[style], pruning_units=UNITS if gates else [])
    if gates:
        set_gates(encoder, 1.0)
    quantised = torch.ao.quantization.quantize_dynamic(encoder, {nn.Linear}, dtype=torch.qint8)
    assert not any(type(module) is nn.Linear for module in quantised.modules())
    source = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(4000) >= torch.tensor([[4000], [2000]])
    with torch.no_grad():
        wanted, found = encoder(source, mask), quantised(source, mask)
    for state, right in zip(found.hidden_states, wanted.hidden_states):
        error = (state - right).norm() / right.norm()
        assert 0 < error < 0.1  # of 8 bits
