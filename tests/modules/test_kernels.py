"""Every kernel against float64 sums, the choice among them, and encoders with each."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skill_fairseq.modules import kernels
from skill_fairseq.modules.kernels import KERNELS, FrozenLinear, Product, choose_for_linears, linear
from skill_fairseq.objectives.teacher import FrozenTeacher
from tests.conftest import LARGE_STYLE, random_encoder

SHAPES = [(1, 64, 48, 1), (1, 17, 33, 1), (3, 24, 40, 2), (3, 13, 7, 2), (2, 32, 16, 2), (4, 8, 8, 2)]
PRUNED = [13, 16, 11, 7, 15, 5, 9]
"""Channels of convolutions, few of them multiples of 8."""
NEW_TORCH = int(torch.__version__.split(".")[0]) >= 2


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_measured", {})
    monkeypatch.setattr(kernels, "_read", set())
    monkeypatch.delenv(kernels.SETTING, raising=False)
    monkeypatch.delenv(kernels.CACHE, raising=False)


def by_hand(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """(N, C) to (rows, O) in float64, window by window."""
    x, weight = x.double(), weight.double()
    starts = range(0, len(x) - len(weight) + 1, stride)
    rows = [(x[s : s + len(weight)][:, :, None] * weight).sum((0, 1)) for s in starts]
    return torch.stack(rows) + (0 if bias is None else bias.double())


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("frames", [30, 41])
def test_every_kernel_is_exact(name: str, shape: tuple[int, int, int, int], frames: int) -> None:
    size, inputs, outputs, stride = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(frames, inputs, generator=generator)
    weight = torch.randn(size, inputs, outputs, generator=generator)
    for bias in (None, torch.randn(outputs, generator=generator)):
        product = Product(weight, bias, stride, name)
        wanted = by_hand(x, weight, bias, stride)
        with torch.inference_mode():
            found = product._kernel(name)(x)
        assert found.shape == wanted.shape
        assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()


@pytest.mark.skipif(not NEW_TORCH, reason="torch >= 2.0 has the others")
def test_kernels_are_not_all_the_same() -> None:
    linear_map = Product(torch.randn(1, 8, 8), None), {"onednn_linear", "onednn_conv"}
    convolution = Product(torch.randn(3, 8, 8), None, 2), {"onednn_conv", "unfolded"}
    for product, expected in (linear_map, convolution):
        plain = product._kernel("plain")
        assert {name for name in KERNELS if product._kernel(name) is not plain} == expected


def test_the_fastest_is_chosen_and_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernels, "LEAST_MACS", 1)
    monkeypatch.setenv(kernels.CACHE, str(tmp_path / "kernels.json"))
    asked = []

    def seconds(self: Product, x: Tensor) -> dict[str, float]:
        asked.append(len(x))
        return {"plain": 1.0, "unfolded": 0.96 if len(x) > 64 else 0.5}

    monkeypatch.setattr(Product, "seconds", seconds)
    product = Product(torch.randn(3, 8, 8), None, 2)
    assert [product.chosen(torch.zeros(n, 8)) for n in (60, 64, 100)] == ["unfolded", "unfolded", "plain"]
    assert asked == [60, 100]  # similar lengths share a choice, and 4 % is too little gain
    assert kernels.chosen() == {"plain": 1, "unfolded": 1}
    kernels._measured.clear()  # as in another process
    kernels._read.clear()
    assert product.chosen(torch.zeros(60, 8)) == "unfolded" and asked == [60, 100]
    (tmp_path / "kernels.json").write_text("no JSON")
    kernels._measured.clear()
    kernels._read.clear()
    assert product.chosen(torch.zeros(60, 8)) == "unfolded" and asked == [60, 100, 60]
    assert set(json.loads((tmp_path / "kernels.json").read_text()).values()) == {"unfolded"}


def test_a_file_of_answers_that_cannot_be_written_ends_no_forward(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kernels, "LEAST_MACS", 0)
    monkeypatch.setenv(kernels.CACHE, str(tmp_path / "missing" / "kernels.json"))
    weight, x = torch.randn(3, 8, 8), torch.randn(60, 8)
    with pytest.warns(UserWarning, match="SKILL_KERNELS_CACHE: .*cannot be written"):
        found = Product(weight, None, 2)(x)
    assert (found - by_hand(x, weight, None, 2)).abs().max() < 1e-4
    assert not list(tmp_path.iterdir())


def test_a_wrong_kernel_is_not_chosen() -> None:
    product = Product(torch.randn(3, 8, 8), None, 2)
    product._made["unfolded"] = lambda x: product._kernel("plain")(x) * 1.001
    assert "unfolded" not in product.seconds(torch.randn(20, 8)) and "plain" in product.seconds(torch.randn(20, 8))


def test_small_products_and_other_types_are_not_measured() -> None:
    product = Product(torch.randn(1, 8, 8), None)
    assert product.chosen(torch.randn(20, 8)) == "plain" and not kernels._measured
    wide = Product(torch.zeros(1, 2048, 2048, dtype=torch.float64), None)
    assert wide.chosen(torch.zeros(20, 2048, dtype=torch.float64)) == "plain" and not kernels._measured


STYLES: list[dict[str, Any]] = [
    {},
    LARGE_STYLE,
    {"conv_bias": True, "relative_position": False},
    {"conv_bias": True, "conv_channels": PRUNED},
    {**LARGE_STYLE, "conv_channels": PRUNED},
]


@pytest.mark.parametrize("style", STYLES, ids=str)
@pytest.mark.parametrize("name", [*KERNELS, "measured"])
def test_encoders_by_each_kernel(style: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LEAST_MACS", 1)
    encoder = random_encoder(**style)
    source = torch.randn(3, 7001, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = copy.deepcopy(encoder).double()(source.double()).hidden_states
        before = encoder(source).hidden_states
        found = encoder.prepare(name)(source).hidden_states
    for state, plain, wanted in zip(found, before, exact):
        assert (state - wanted).abs().max() <= 1e-5 * wanted.abs().max()  # LayerNorms magnify rounding
        assert name != "plain" or torch.equal(state, plain)


@pytest.mark.parametrize("gradients", [True, False])
def test_linear_maps_and_convolutions_use_their_kernels(gradients: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if parameters require gradients while the encoder is prepared, as they do after loading."""
    monkeypatch.setattr(kernels, "LEAST_MACS", 1)
    used = []
    call = Product.__call__
    monkeypatch.setattr(Product, "__call__", lambda self, x: used.append(self.weight.shape) or call(self, x))
    encoder = random_encoder(conv_channels=PRUNED)
    with torch.set_grad_enabled(gradients):
        encoder.prepare()
    with torch.inference_mode():
        encoder(torch.randn(1, 7001))
    sizes = [kernel for _, kernel, _ in encoder.config.conv_feature_layers]
    padded = [-(-channels // 8) * 8 for channels in PRUNED]
    wanted = list(zip(sizes[1:], padded, padded[1:]))
    assert [tuple(shape) for shape in used[: len(wanted)]] == wanted
    assert any(shape[0] == 1 for shape in used[len(wanted) :])


def test_the_setting_comes_from_the_call_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = random_encoder()
    layer = encoder.transformer.layers[0].ffn.fc1  # type: ignore[union-attr]

    def choice() -> str:
        product = layer.__dict__["_kernels"]
        return "plain" if product is None else str(product.choice)

    encoder.prepare()
    assert choice() == "measured"
    FrozenTeacher(encoder)
    assert choice() == "plain"  # training targets are the same everywhere
    monkeypatch.setenv(kernels.SETTING, "onednn_conv")
    encoder.prepare()
    assert choice() == "onednn_conv"
    FrozenTeacher(encoder)
    assert choice() == "onednn_conv"
    with pytest.raises(ValueError, match="kernels: 'mkl'; expected measured or one of plain, onednn_linear"):
        encoder.prepare("mkl")
    monkeypatch.setenv(kernels.SETTING, "fast")
    with pytest.raises(ValueError, match="SKILL_KERNELS: 'fast'; expected measured"):
        encoder.prepare()


def test_layers_that_change_are_called_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LEAST_MACS", 1)
    layer, x = nn.Linear(8, 8), torch.randn(2, 5, 8)
    choose_for_linears(layer, "onednn_conv")
    product = layer.__dict__["_kernels"]
    calls = []
    monkeypatch.setattr(FrozenLinear, "__call__", lambda self, x: calls.append(0) or Product.__call__(self, x))
    with torch.no_grad():
        torch.testing.assert_close(linear(layer, x), layer(x))
        assert len(calls) == 1
        handle = layer.register_forward_hook(lambda module, inputs, output: output + 1)
        torch.testing.assert_close(linear(layer, x), layer(x))
        handle.remove()
        layer.weight.mul_(2)
        torch.testing.assert_close(linear(layer, x), layer(x))
    assert linear(layer, x).requires_grad and len(calls) == 1
    assert copy.deepcopy(layer).__dict__["_kernels"] is None
    assert pickle.loads(pickle.dumps(layer)).__dict__["_kernels"] is None
    assert layer.__dict__["_kernels"] is product and layer.state_dict().keys() == {"weight", "bias"}
