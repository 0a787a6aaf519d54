"""Both kinds of positional convolution at lower precision: some CPU kernels for it are wrong."""

from __future__ import annotations

import pytest
import torch

from skill_fairseq.modules.positional_conv import PositionalConv
from skill_fairseq.modules.positional_conv_stack import PositionalConvStack

KINDS = {"one": lambda: PositionalConv(32, 16, 4), "stack": lambda: PositionalConvStack(32, 16, 4, 2)}


@pytest.mark.parametrize("autocast", [False, True], ids=["cast", "autocast"])
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_float32_rounded(kind: str, autocast: bool) -> None:
    torch.manual_seed(0)
    module = KINDS[kind]()
    x = torch.randn(2, 24, 32)
    exact = module(x)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = module(x) if autocast else module.bfloat16()(x.bfloat16())
    assert autocast or found.dtype == torch.bfloat16
    assert 0 <= (found.float() - exact).norm() < 0.02 * exact.norm()
