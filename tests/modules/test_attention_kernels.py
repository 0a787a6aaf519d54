"""Attention kernels of other devices, forced on a CPU and checked against textbook operations."""

from __future__ import annotations

import functools
from typing import Any, Callable

import pytest
import torch
import torch.nn.functional as F
from reference import encode
from torch import Tensor

from skill_fairseq.modules import attention_core
from skill_fairseq.modules.attention_core import (
    LONG,
    attend_blockwise,
    attend_fused,
    attend_whole,
    choose_kernel,
)
from skill_fairseq.modules.encoder import SpeechEncoder
from tests.conftest import LARGE_STYLE, random_encoder
from tests.modules.test_fast_path import UNITS, batch, run, set_gates

needs_fused = pytest.mark.skipif(
    not hasattr(F, "scaled_dot_product_attention"), reason=f"torch {torch.__version__} has no such kernel"
)
KERNELS = [pytest.param(attend_fused, marks=needs_fused), attend_whole]
STYLES: dict[str, dict[str, Any]] = {
    "wavlm": {},
    "hubert": {"relative_position": False},
    "large": LARGE_STYLE,
}


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Makes every attention use a kernel."""
    return lambda kernel: monkeypatch.setattr(attention_core, "choose_kernel", lambda *_: kernel)


def with_attention_dropout(encoder: SpeechEncoder, probability: float) -> SpeechEncoder:
    for layer in encoder.transformer.layers:
        if layer.attention is not None:
            layer.attention.dropout = probability
    return encoder


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_outputs_and_gradients_in_float64(kernel: Any, style: str, padded: bool, dropout: float, force: Any) -> None:
    encoder = with_attention_dropout(random_encoder(**STYLES[style], pruning_units=UNITS[:3]).double().train(), dropout)
    generator = set_gates(encoder, 3.0)  # all heads are computed, so both draw equally many numbers for dropout
    for name, gate in encoder.named_gates():
        if ".attention." in name:
            gate.log_alpha.data.fill_(9.0)
    source, mask = batch(torch.float64)
    force(kernel)
    torch.manual_seed(0)
    states, gradients = run(encoder, source, mask if padded else None, generator)
    order = [-1] if encoder.config.relative_position else []  # then the kernels' keys are reversed

    def drop(weights: Tensor) -> Tensor:
        return F.dropout(weights.flip(order), dropout).flip(order)

    torch.manual_seed(0)
    textbook = functools.partial(encode, drop=drop)
    plain_states, plain_gradients = run(encoder, source, mask if padded else None, generator, textbook)
    for state, plain in zip(states, plain_states):
        torch.testing.assert_close(state, plain, rtol=1e-10, atol=1e-10)
    assert gradients.keys() == plain_gradients.keys()
    assert any(name.endswith("grep_a") for name in gradients) == encoder.config.relative_position
    for name, gradient in gradients.items():
        rounding = 2e-6 if name.endswith("log_alpha") else 1e-9
        plain = plain_gradients[name]
        assert (gradient - plain).abs().max() <= rounding * plain.abs().max().clamp(min=1.0), name


@pytest.mark.skipif(not hasattr(torch, "compile"), reason="torch < 2 has few operations in bfloat16 on a CPU")
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
def test_in_bfloat16_no_farther_from_float64_than_the_best(kernel: Any, padded: bool, force: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 40, 16)] * 3 + [(2, 3, 40, 1), (3, 79)]
    exact = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    weights = torch.randn(2, 40, 3, 16, generator=generator, dtype=torch.float64)
    mask = (torch.arange(40) >= torch.tensor([[40], [25]])) if padded else None

    def found(by: Any, dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in exact]
        out = by(*inputs, mask, 0.0)
        return [out.detach(), *torch.autograd.grad((out * weights.to(dtype)).sum(), inputs)]

    wanted, here, blockwise = (
        found(attend_whole, torch.float64),
        found(kernel, torch.bfloat16),
        found(attend_blockwise, torch.bfloat16),  # computes in float32, and rounds inputs and outputs only
    )
    for right, ours, best in zip(wanted, here, blockwise):
        error, least = ((x.double() - right).norm() / right.norm() for x in (ours, best))
        assert least < 0.01
        assert error < 0.02


@needs_fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("style", STYLES)
def test_an_utterance_whose_every_key_is_hidden(style: str, dtype: torch.dtype, force: Any) -> None:
    """Kernels of torch 2.0 to 2.4 give NaN for it, later ones 0, so they never get it."""
    encoder = random_encoder(**STYLES[style], padding_rule="convolution").train()
    source, mask = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 4000).bool()
    mask[0, 300:] = True  # 300 samples give no frame
    seen: list[Tensor] = []

    def watched(*arguments: Any) -> Tensor:
        seen.append(arguments[5])
        return attend_fused(*arguments)

    force(watched)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = encoder(source.masked_fill(mask, 0.0), mask)
    assert out.padding_mask is not None and out.padding_mask[0].all() and not out.padding_mask[1].any()
    assert seen and not any(hidden.all(1).any() for hidden in seen)
    out.x[1].float().square().sum().backward()
    for state in out.hidden_states:
        assert torch.isfinite(state).all()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


def test_which_kernel_where(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = attend_fused if hasattr(F, "scaled_dot_product_attention") else attend_blockwise
    flash = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
    assert choose_kernel("cpu", 50, True, True) is attend_blockwise
    assert choose_kernel("cpu", LONG, True, False) is fused
    assert choose_kernel("cpu", LONG + 1, True, False) is attend_blockwise
    assert choose_kernel("cpu", LONG + 1, False, False) is (attend_fused if flash else attend_blockwise)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None, raising=False)
    for gradients in (True, False):
        assert choose_kernel("cuda", LONG + 1, True, gradients) is attend_fused
    monkeypatch.delattr(F, "scaled_dot_product_attention")  # torch 1.12 and 1.13
    for gradients in (True, False):
        assert choose_kernel("cuda", LONG + 1, True, gradients) is attend_whole
        assert choose_kernel("cpu", 50, False, gradients) is attend_blockwise


@needs_fused  # together with modes that observe every operation
@pytest.mark.parametrize("relative_position", [True, False])
def test_long_inputs_keep_no_matrix_without_gradients(relative_position: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor of a forward over T frames has far fewer than T^2 numbers; outputs equal the plain ones."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        nbytes = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, Tensor):  # a view is as large as its base
                    storage = getattr(tensor, "untyped_storage", tensor.storage)()
                    self.nbytes = max(self.nbytes, storage.nbytes())
            return out

    monkeypatch.setattr(attention_core, "LONG", 300)
    monkeypatch.setattr(attention_core, "BLOCK_SCORES", 1 << 14)
    encoder = random_encoder(relative_position=relative_position)
    layer, table = encoder.transformer.layers[0], encoder.transformer.relative_position
    x = torch.randn(2, 1200, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(1200) >= torch.tensor([[1200], [700]])
    by_offset = None if table is None else table(1200)
    with torch.no_grad(), Largest() as largest:
        found = layer(x, by_offset, mask)
    assert largest.nbytes <= 4 * 2 * 1200 * 48  # the FFN's activations, of B T 48 numbers
    torch.testing.assert_close(found, layer(x, by_offset, mask).detach())
