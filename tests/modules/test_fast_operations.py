"""Each operation of the fast path against torch's own, and its gradient against finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skill_fairseq.modules import attention_core, norms
from skill_fairseq.modules import fft_conv as fft_module
from skill_fairseq.modules.activated_conv import activated_conv
from skill_fairseq.modules.attention_core import attend, expand_offsets
from skill_fairseq.modules.fft_conv import fft_conv, kernel_spectrum
from skill_fairseq.modules.norms import group_norm_of_linear
from skill_fairseq.modules.relative_position import RelativePosition, relative_position_bucket
from skill_fairseq.modules.slicing import take


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Double precision, differentiable."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("kernel_size, stride", [(1, 1), (2, 2), (3, 2), (10, 5), (7, 3), (2, 3), (3, 1)])
def test_activated_conv(kernel_size: int, stride: int, activation: str) -> None:
    frames = 6 * stride
    x, kernel, bias = randn(2 * frames, 4), randn(kernel_size, 4, 3), randn(3)
    rows = activated_conv(x, kernel, bias, stride, activation).unflatten(0, (2, -1))
    active = getattr(F, activation)(x).unflatten(0, (2, frames)).transpose(1, 2)
    wanted = F.conv1d(active, kernel.permute(2, 1, 0), bias, stride).transpose(1, 2)
    valid = wanted.size(1)
    assert rows.size(1) == 6 and valid == 6 - (-(-kernel_size // stride) - 1)
    torch.testing.assert_close(rows[:, :valid], wanted)

    def usable(*arguments: Tensor) -> Tensor:
        return activated_conv(*arguments, stride, activation).unflatten(0, (2, -1))[:, :valid]

    assert torch.autograd.gradcheck(usable, (x, kernel, bias))


def test_activated_conv_as_a_linear_layer_of_a_transposed_weight() -> None:
    x, weight = randn(5, 4), randn(3, 4)
    found = activated_conv(x, weight.t().unsqueeze(0), None)
    torch.testing.assert_close(found, F.linear(F.gelu(x), weight))
    (gradient,) = torch.autograd.grad(found.square().sum(), weight)
    (wanted,) = torch.autograd.grad(F.linear(F.gelu(x), weight).square().sum(), weight)
    torch.testing.assert_close(gradient, wanted)


def test_take_returns_gradients_to_their_places() -> None:
    source, index = randn(5, 4), torch.tensor([0, 3])
    for dim in (0, 1):
        assert torch.equal(take(source, dim, index), source.index_select(dim, index))
        assert torch.autograd.gradcheck(lambda s, dim=dim: take(s, dim, index), (source,))
    assert take(source, 0, None) is source


def attention(
    q: Tensor, k: Tensor, v: Tensor, factor: Tensor | None, by_offset: Tensor | None, padding_mask: Tensor | None
) -> Tensor:
    """The definition, pair by pair."""
    frames = q.size(2)
    scores = q @ k.transpose(2, 3) / q.size(3) ** 0.5
    if factor is not None and by_offset is not None:
        bias = torch.stack(
            [
                torch.stack([by_offset[:, frames - 1 - (key - query)] for key in range(frames)], 1)
                for query in range(frames)
            ],
            1,
        )
        scores = scores + factor * bias
    if padding_mask is not None:
        scores = scores.masked_fill(padding_mask[:, None, None], float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_attention_against_its_definition(
    biased: bool, padded: bool, gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_core, "BLOCK_QUERIES", 4)
    monkeypatch.setattr(attention_core, "BLOCK_SCORES", 100)
    q, k, v = (randn(2, 3, 11, 4, seed=i) for i in range(3))
    factor, by_offset = (randn(2, 3, 11, 1), randn(3, 21)) if biased else (None, None)
    mask = None
    if padded:
        mask = torch.zeros(2, 11, dtype=torch.bool)
        mask[0, 6:] = True
    with torch.set_grad_enabled(gradients):  # without gradients, torch's own kernel
        found = attend(q, k, v, factor, by_offset, mask)
    torch.testing.assert_close(found, attention(q, k, v, factor, by_offset, mask))
    if gradients:
        inputs = [x for x in (q, k, v, factor, by_offset) if x is not None]
        optional = [None] * (5 - len(inputs))
        assert torch.autograd.gradcheck(lambda *x: attend(*x, *optional, mask), inputs)


def test_attention_dropout() -> None:
    q, k = randn(1, 2, 9, 4), randn(1, 2, 9, 4, seed=1)
    v = torch.ones(1, 2, 9, 1, dtype=torch.float64)
    torch.manual_seed(0)
    sums = torch.stack([attend(q, k, v, dropout=0.3).detach() for _ in range(2000)])
    assert abs(float(sums.mean()) - 1.0) < 0.01  # each weight is dropped or scaled up, so the mean stays
    assert float(sums.std()) > 0.1

    def repeatable(*x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return attend(*x, dropout=0.3)

    # The backward pass drops the same entries as the forward pass.
    assert torch.autograd.gradcheck(repeatable, (q, k, randn(1, 2, 9, 3)))
    masks = attention_core._Dropout(0.1, 3).masks(torch.device("cpu"))
    dropped = 1 - masks(torch.empty(1000, 999)).double().mean()
    assert abs(float(dropped) - 0.1) < 4 * (0.1 * 0.9 / 999_000) ** 0.5


def test_relative_position_by_offset() -> None:
    table = RelativePosition(num_buckets=32, max_distance=40, num_heads=3)
    frames = 13
    by_offset = table(frames)
    pairs = expand_offsets(by_offset).flip(2)  # keys in order
    for query in range(frames):
        for key in range(frames):
            bucket = int(relative_position_bucket(torch.tensor(key - query), 32, 40))
            assert torch.equal(pairs[:, query, key], table.weight[bucket])


@pytest.mark.parametrize("frames", [1, 5, 63, 64, 65, 200])
@pytest.mark.parametrize("kernel_size", [16, 31, 19])
def test_fft_conv(kernel_size: int, frames: int) -> None:
    x, kernel = randn(2, frames, 12), randn(12, 3, kernel_size)
    found = fft_conv(x, kernel_spectrum(kernel, groups=4), kernel_size)
    wanted = F.conv1d(x.transpose(1, 2), kernel, padding=kernel_size // 2, groups=4)[..., :frames].transpose(1, 2)
    torch.testing.assert_close(found, wanted)
    for a, b in zip(
        torch.autograd.grad(found.square().sum(), (x, kernel)), torch.autograd.grad(wanted.square().sum(), (x, kernel))
    ):
        torch.testing.assert_close(a, b)


def test_fft_conv_of_long_input_goes_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    x, kernel = randn(2, 700, 12), randn(12, 3, 16)
    spectrum = kernel_spectrum(kernel, groups=4)
    whole = fft_conv(x, spectrum, 16)
    transform = torch.fft.rfft
    blocks: list[int] = []
    monkeypatch.setattr(torch.fft, "rfft", lambda x, **k: (blocks.append(x.size(1)), transform(x, **k))[1])
    monkeypatch.setattr(fft_module, "MOST_BLOCKS", 10)
    torch.testing.assert_close(fft_conv(x, spectrum, 16), whole, rtol=1e-12, atol=1e-12)
    assert max(blocks) == 10 and sum(blocks) == -(-700 // 17)


def test_fft_conv_in_float32_is_as_exact_as_the_plain_one() -> None:
    x, kernel = randn(1, 500, 96), randn(96, 6, 128)
    exact = F.conv1d(x.transpose(1, 2), kernel, padding=64, groups=16)[..., :500].transpose(1, 2)
    single, weight = x.float(), kernel.float()
    plain = F.conv1d(single.transpose(1, 2), weight, padding=64, groups=16)[..., :500].transpose(1, 2)
    found = fft_conv(single, kernel_spectrum(weight, 16), 128)
    scale = exact.abs().max()
    assert (found - exact).abs().max() / scale < 2e-6
    assert (plain - exact).abs().max() / scale < 2e-6


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_group_norm_folded_into_the_map_before(offset: float, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    windows, kernel = randn(2, 300, 10) + offset, randn(10, 4)
    shift = randn(4, seed=1) if bias else None
    norm = nn.GroupNorm(4, 4).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    factor, moved = group_norm_of_linear(windows, kernel, shift, norm.weight, norm.bias, norm.eps)
    monkeypatch.setattr(norms, "MOST_WINDOWS", 70)  # a long recording's statistics, in pieces
    again = group_norm_of_linear(windows, kernel, shift, norm.weight, norm.bias, norm.eps)
    for one, other in zip(again, (factor, moved)):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    found = windows @ (kernel * factor) + moved
    mapped = windows @ kernel if shift is None else windows @ kernel + shift
    wanted = norm(mapped.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(found, wanted)
    inputs = (kernel, norm.weight, norm.bias)
    weights = randn(*found.shape).detach()
    for a, b in zip(
        torch.autograd.grad((found * weights).sum(), inputs), torch.autograd.grad((wanted * weights).sum(), inputs)
    ):
        torch.testing.assert_close(a, b)
