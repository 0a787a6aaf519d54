"""Rounding in training: numbers against brute force, straight-through gradients, ranges, and what is refused."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from messages import says
from torch import Tensor, nn

from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.fake_quantize import (
    BOUNDS,
    MOST,
    InputRange,
    QuantizedLinear,
    Ranges,
    dequantize_weight,
    fake_quantize_weight,
    quantize_weight,
    quantized_modules,
    range_of,
    steps_of,
    whole_weight,
    without_quantization,
)
from skill_fairseq.modules.low_precision import TrainedLinear, lower
from tests.conftest import LARGE_STYLE, random_encoder

DATA2VEC = {"pos_conv_depth": 3, "conv_pos": 15, "conv_pos_groups": 4, "time_reduction": 2}
PRUNED = {"heads": [[0, 2], [], None], "ffn_dims": [5, None, 0]}


def source(seed: int = 0) -> Tensor:
    return torch.randn(2, 6000, generator=torch.Generator().manual_seed(seed))


def quantized(known: bool = True, **shape: Any) -> SpeechEncoder:
    """A random encoder that rounds, with the ranges of two updates."""
    plain = random_encoder(**shape)
    encoder = SpeechEncoder(plain.config.replace(quantize="int8")).eval()
    missing = encoder.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing and all(name.endswith(BOUNDS) for name in missing)
    if known:
        ranges = Ranges(encoder)
        ranges.watch(True)
        for update in range(2):
            with torch.no_grad():
                encoder(source(update))
            ranges.follow(update)
        ranges.watch(None)
    return encoder


def difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().sum() / wanted.abs().sum())


@pytest.mark.parametrize("shape", [(3, 5), (4, 2, 6)], ids=str)
def test_weights_against_brute_force(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 2, shape[0]).view(
        -1, *(1,) * (len(shape) - 1)
    )
    weight[1] = 0
    weight.requires_grad_()
    rounded = fake_quantize_weight(weight)
    steps, scale = quantize_weight(weight)
    assert steps.dtype == torch.int8 and steps.abs().amax() == MOST == 63
    assert torch.equal(dequantize_weight(steps, scale), rounded)
    for channel, row in enumerate(weight.tolist()):
        flat = torch.tensor(row).flatten().tolist()
        step = max(map(abs, flat)) / 63
        wanted = [step * round(x / step) if step else 0.0 for x in flat]
        assert rounded[channel].flatten().tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-30)
    (3 * rounded).sum().backward()
    assert torch.equal(weight.grad, torch.full(shape, 3.0))  # straight through, the largest weight too


def test_rounding_twice_changes_nothing() -> None:
    """What is stored in steps and read back is rounded to the same steps."""
    steps, scale = quantize_weight(torch.randn(50, 40, generator=torch.Generator().manual_seed(2)))
    again, scales = quantize_weight(dequantize_weight(steps, scale))
    assert torch.equal(again, steps)
    torch.testing.assert_close(scales, scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.5, 2.0), (-4.0, -1.0), (-1e-3, 1e3)])
def test_inputs_against_brute_force(low: float, high: float) -> None:
    """Zero is exact, what lies beyond the range is cut off, and gets no gradient."""
    one = InputRange().eval()
    one.set(torch.tensor([low, high]))
    wide = max(high, 0) - min(low, 0)
    x = torch.rand(701, generator=torch.Generator().manual_seed(3)) * 5 * wide / 3 + min(low, 0) - wide / 3
    x.requires_grad_()
    y = one(x)
    step = wide / 255
    zero = min(max(round(-min(low, 0) / step), 0), 255)
    scale, found = steps_of(one.bounds)
    assert float(scale) == pytest.approx(step, rel=1e-6) and int(found) == zero
    wanted = [step * (min(max(round(value / step) + zero, 0), 255) - zero) for value in x.tolist()]
    off = [abs(a - b) for a, b in zip(y.tolist(), wanted)]
    assert max(off) <= 1.001 * step and sum(o > 1e-4 * step for o in off) <= 3  # ties may go the other way
    assert float(one(torch.zeros(1))) == 0
    y.sum().backward()
    inside = (x >= -(zero + 0.4) * step) & (x <= (255 - zero + 0.4) * step)
    outside = (x < -(zero + 0.6) * step) | (x > (255 - zero + 0.6) * step)
    assert x.grad is not None and (x.grad[inside] == 1).all() and (x.grad[outside] == 0).all()
    assert inside.any() and outside.any()


def test_ranges_are_moving_averages_of_updates() -> None:
    model = nn.ModuleList([InputRange(), InputRange()]).train()
    ranges = Ranges(model)
    lows, highs = [-1.0, -3.0, -2.0], [2.0, 5.0, 1.0]
    for update, (low, high) in enumerate(zip(lows, highs)):
        for value in (low, 0.0, high):  # the batches of an update count together
            model[0](torch.tensor([value]))
        ranges.follow(update)
        assert model[0].bounds.tolist() == pytest.approx(
            [sum(lows[: update + 1]) / (update + 1), sum(highs[: update + 1]) / (update + 1)]
        )
    before = model[0].bounds.tolist()
    model[0](torch.tensor([-10.0, 10.0]))
    ranges.forget()  # an update that was skipped
    model[0](torch.tensor([math.inf]))
    ranges.follow(3)
    assert model[0].bounds.tolist() == before
    model[0](torch.tensor([-100.0, 100.0]))
    ranges.follow(5000)
    assert model[0].bounds.tolist() == pytest.approx([0.99 * before[0] - 1, 0.99 * before[1] + 1])
    assert not model[1].known and model[1].bounds.tolist() == [0, 0]  # nothing came
    model.eval()
    model[0](torch.tensor([1e6]))
    assert model[0].seen.tolist() == [math.inf, -math.inf]  # evaluation is not looked at


@pytest.mark.parametrize("style", [{}, LARGE_STYLE, DATA2VEC, PRUNED, {"adapter_dim": 6}], ids=str)
def test_what_is_rounded(style: dict[str, Any]) -> None:
    encoder = quantized(**style)
    names = dict(quantized_modules(encoder))
    assert not [n for n, m in encoder.named_modules() if type(m) is nn.Linear and not n.endswith("grep_linear")]
    extractor = [f"feature_extractor.layers.{i}" for i in range(1, 7)]
    assert [name for name in names if name.startswith("feature_extractor")] == extractor
    assert [name for name in names if range_of(names[name]) is None] == extractor
    assert sum("pos_conv" in name for name in names) == style.get("pos_conv_depth", 1)
    plain = without_quantization(encoder)
    assert plain.config.quantize == "none" and not list(quantized_modules(plain))
    assert encoder.num_parameters() == plain.num_parameters()
    with torch.no_grad():
        wanted, found = plain(source()).hidden_states, encoder(source()).hidden_states
    errors = [difference(f, w) for f, w in zip(found, wanted)]
    assert 1e-3 < min(errors) and max(errors) < 0.1

    # By hand: weights rounded, and what goes into each product rounded by a hook, in the plain encoder.
    with torch.no_grad():
        for name, module in names.items():
            own = plain.get_submodule(name)
            weight = fake_quantize_weight(whole_weight(module))
            if hasattr(own, "weight_v"):
                own.weight_v.copy_(weight)
                own.weight_g.copy_(weight.norm(dim=(0, 1), keepdim=True))
            else:
                whole_weight(own).copy_(weight)
            if name not in extractor:
                own.register_forward_pre_hook(lambda _, x, r=module.input_range: (r(x[0]),))
        by_hand = plain(source()).hidden_states
    assert max(difference(b, f) for b, f in zip(by_hand, found)) < 0.005  # a value between two steps may go either way


def test_gradients_are_those_of_rounded_weights_and_inputs() -> None:
    """Of one layer by hand, and of every parameter of the encoder there are some."""
    layer = QuantizedLinear(nn.Linear(6, 4)).eval()
    layer.input_range.set(torch.tensor([-1.0, 1.0]))
    x = torch.linspace(-2, 2, 30).view(5, 6).requires_grad_()
    out = layer(x)
    out.square().sum().backward()
    rounded = layer.input_range(x).detach()
    inside = (x.detach().abs() < 0.999).float()
    torch.testing.assert_close(layer.weight.grad, 2 * out.detach().t() @ rounded)
    torch.testing.assert_close(x.grad, (2 * out.detach() @ fake_quantize_weight(layer.weight).detach()) * inside)
    encoder = quantized().train()
    encoder(source()).x.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())


def test_kept_activations_or_not_gradients_are_the_same() -> None:
    found = []
    for again in (False, True):
        encoder = quantized(known=False).train()
        encoder.transformer.checkpoint_activations = again
        encoder(source()).x.square().mean().backward()
        Ranges(encoder).follow(0)
        found.append([*(p.grad for p in encoder.parameters()), *(m.bounds for m in Ranges(encoder).ranges)])
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ranges_stay_float32_in_half_precision(dtype: torch.dtype) -> None:
    encoder = quantized()
    bounds = [m.bounds.clone() for m in Ranges(encoder).ranges]
    lower = copy.deepcopy(encoder).to(dtype)
    assert all(torch.equal(m.bounds, b) for m, b in zip(Ranges(lower).ranges, bounds))
    if dtype == torch.bfloat16 and hasattr(torch, "get_autocast_dtype"):
        with torch.no_grad():
            wanted, half = encoder(source()).x, lower(source()).x
            with torch.autocast("cpu", dtype):
                mixed = encoder(source()).x
        assert difference(half.float(), wanted) < 0.05 and difference(mixed.float(), wanted) < 0.05


@pytest.mark.skipif(not hasattr(torch, "get_autocast_dtype"), reason="torch < 2.4 has other int8 products")
@pytest.mark.filterwarnings("ignore:precision")
@pytest.mark.parametrize("style", [{}, LARGE_STYLE, DATA2VEC, PRUNED], ids=str)
def test_int8_products_are_those_of_training(style: dict[str, Any]) -> None:
    encoder = quantized(**style)
    with torch.no_grad():
        wanted = encoder(source()).hidden_states
        prepared = copy.deepcopy(encoder).prepare("plain")(source()).hidden_states
        low = lower(copy.deepcopy(encoder), "int8")
        found = low(source()).hidden_states
    assert any(isinstance(module, TrainedLinear) for module in low.modules())
    assert not any(isinstance(module, QuantizedLinear) for module in low.modules())
    assert max(difference(a, b) for a, b in zip(prepared, wanted)) < 1e-3
    assert max(difference(a, b) for a, b in zip(found, wanted)) < 0.01  # a value between two steps may go either way


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=says("model.quantize", "int4", "int8")):
        EncoderConfig(quantize="int4")
    with pytest.raises(ValueError, match=says("model.quantize", "model.pruning_units", "stage 2")):
        EncoderConfig(quantize="int8", pruning_units=["heads"])
    with pytest.raises(ValueError, match=says("bf16", "int8", "fp32")):
        lower(quantized(), "bf16")
    with pytest.raises(ValueError, match=says("ranges", "model.quantize=int8")):
        lower(quantized(known=False), "int8")


def test_config_of_others_is_written_as_before() -> None:
    config = EncoderConfig()
    assert "quantize" not in config.to_dict()
    with_it = config.replace(quantize="int8")
    assert EncoderConfig.from_dict(with_it.to_dict()) == with_it != config
