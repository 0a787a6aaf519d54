from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from messages import says
from torch import Tensor, nn

from skill_fairseq.modules.hard_concrete import keep_probability
from skill_fairseq.modules.size import StaticShape, Widths, count_macs, count_parameters, sparsity

ORACLE = json.loads((Path(__file__).parents[1] / "oracle" / "sizes.json").read_text())
EXPECTED = [
    pytest.param(name, case, id=f"{name}-{i}")
    for name, model in ORACLE["models"].items()
    for i, case in enumerate(model["expected"])
]

HUBERT_BASE = StaticShape(
    conv_kernels=(10, 3, 3, 3, 3, 2, 2),
    conv_strides=(5, 2, 2, 2, 2, 2, 2),
    conv_bias=False,
    extractor_mode="default",
    embed_dim=768,
    head_dim=64,
    conv_pos=128,
    conv_pos_groups=16,
    relative_position=False,
    num_buckets=320,
    full_heads=12,
)
HUBERT_LARGE = dataclasses.replace(HUBERT_BASE, extractor_mode="layer_norm", embed_dim=1024, full_heads=16)
STATIC = {
    "hubert-base": HUBERT_BASE,
    "wavlm-base": dataclasses.replace(HUBERT_BASE, relative_position=True),
    "hubert-large": HUBERT_LARGE,
    "wavlm-large": dataclasses.replace(HUBERT_LARGE, relative_position=True),
}
BASE_WIDTHS = Widths(conv=[512] * 7, heads=[12] * 12, ffn=[3072] * 12)
LARGE_WIDTHS = Widths(conv=[512] * 7, heads=[16] * 24, ffn=[4096] * 24)
FULL = {name: BASE_WIDTHS if name.endswith("base") else LARGE_WIDTHS for name in STATIC}

TINY = StaticShape(
    conv_kernels=(5, 3),
    conv_strides=(3, 2),
    conv_bias=True,
    extractor_mode="layer_norm",
    embed_dim=12,
    head_dim=4,
    conv_pos=6,
    conv_pos_groups=3,
    relative_position=True,
    num_buckets=10,
    full_heads=3,
)


@pytest.mark.parametrize("name", STATIC)
def test_full_models(name: str) -> None:
    size = count_parameters(STATIC[name], FULL[name])
    assert isinstance(size, int)
    assert size == ORACLE["models"][name]["params"]


@pytest.mark.parametrize("name, case", EXPECTED)
def test_expected_size(name: str, case: dict) -> None:
    full, units = FULL[name], case["gated_units"].split(",")

    def gated(unit: str, kind: str, counts: list[int]) -> list[Tensor]:
        probability = torch.ones((), dtype=torch.float64)
        if unit in units:
            probability = keep_probability(torch.tensor(case["log_alpha"][kind], dtype=torch.float64))
        return [count * probability for count in counts]

    ones = [1] * len(full.heads)
    size = count_parameters(
        STATIC[name],
        Widths(
            conv=gated("conv", "conv", full.conv),
            heads=gated("head", "head", full.heads),
            ffn=gated("interm", "interm", full.ffn),
            attention_present=gated("attlayer", "layer", ones),
            ffn_present=gated("ffnlayer", "layer", ones),
        ),
    )
    assert size.item() == pytest.approx(case["expected_params"], rel=1e-9)
    gone = sparsity(size, ORACLE["models"][name]["params"]).item()
    assert gone == pytest.approx(case["sparsity"], abs=1e-9)  # of the full size, as above


@pytest.mark.parametrize("case", ORACLE["pruned"])
def test_pruned_size(case: dict) -> None:
    present = {key: [int(x) for x in case[key]] for key in ("use_attention", "use_feed_forward")}
    widths = Widths(case["conv"], case["heads"], case["ffn"], present["use_attention"], present["use_feed_forward"])
    size = count_parameters(STATIC[case["model"]], widths)
    assert isinstance(size, int)
    assert size == case["params"]


def parameter(size: int) -> nn.Module:
    return nn.ParameterList([nn.Parameter(torch.zeros(size))])


def build_tiny(static: StaticShape, widths: Widths) -> nn.ModuleList:
    """The modules of a small encoder, one by one, to count what torch counts."""
    dim, width = static.embed_dim, static.head_dim
    norm = {
        "layer_norm": [nn.LayerNorm(c) for c in widths.conv],
        "default": [nn.GroupNorm(widths.conv[0], widths.conv[0])],
    }[static.extractor_mode]
    channels = [1, *widths.conv]
    modules: list[nn.Module] = [
        nn.Conv1d(i, o, k, s, bias=static.conv_bias)
        for i, o, k, s in zip(channels, channels[1:], static.conv_kernels, static.conv_strides)
    ]
    modules += [*norm, nn.LayerNorm(channels[-1]), nn.Linear(channels[-1], dim), nn.LayerNorm(dim)]
    position = nn.Conv1d(dim, dim, static.conv_pos, groups=static.conv_pos_groups)
    modules += [position, parameter(static.conv_pos)]  # weight norm adds one magnitude a kernel position
    if static.relative_position:
        modules.append(nn.Embedding(static.num_buckets, static.full_heads))
    for heads, present in zip(widths.heads, widths.attention_present):
        modules += [nn.LayerNorm(dim), nn.LayerNorm(dim)]
        if present and heads:
            modules += [nn.Linear(dim, heads * width) for _ in range(3)] + [nn.Linear(heads * width, dim)]
            if static.relative_position:
                modules += [nn.Linear(width, 8), parameter(static.full_heads)]
        elif present:
            modules.append(parameter(dim))
    for units, present in zip(widths.ffn, widths.ffn_present):
        if present and units:
            modules += [nn.Linear(dim, units), nn.Linear(units, dim)]
        elif present:
            modules.append(parameter(dim))
    return nn.ModuleList(modules)


@pytest.mark.parametrize("mode", ["default", "layer_norm"])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_against_modules_with_removed_and_bias_only_sublayers(mode: str, relative: bool, bias: bool) -> None:
    static = dataclasses.replace(TINY, extractor_mode=mode, relative_position=relative, conv_bias=bias)
    widths = Widths([5, 7], [2, 0, 3, 1], [6, 9, 0, 4], [1, 1, 0, 1], [1, 0, 1, 1])
    wanted = sum(p.numel() for p in build_tiny(static, widths).parameters())
    assert count_parameters(static, widths) == wanted


def test_expectation_is_the_mean_over_all_gates() -> None:
    """Every combination of open gates, counted exactly and weighted by its probability."""
    static = dataclasses.replace(TINY, relative_position=False)
    full, p = [2, 3, 2, 2, 1, 1], [0.3, 0.6, 0.8, 0.45, 0.7, 0.2]  # conv, conv, heads, ffn, attention, ffn

    def widths(values: list) -> Widths:
        return Widths(values[:2], values[2:3], values[3:4], values[4:5], values[5:6])

    mean = 0.0
    for counts in itertools.product(*(range(n + 1) for n in full)):
        chance = math.prod(math.comb(n, k) * q**k * (1 - q) ** (n - k) for n, k, q in zip(full, counts, p))
        mean += chance * count_parameters(static, widths(list(counts)))
    expected = count_parameters(static, widths([torch.tensor(n * q).double() for n, q in zip(full, p)]))
    assert expected.item() == pytest.approx(mean, rel=1e-6)


def test_gradient_against_finite_differences() -> None:
    torch.manual_seed(0)
    conv, layers = torch.rand(2, dtype=torch.float64), torch.rand(4, 3, dtype=torch.float64)

    def size(conv: Tensor, layers: Tensor) -> Tensor:
        rows = [list(row) for row in layers]
        return count_parameters(TINY, Widths(list(5 * conv), rows[0], rows[1], rows[2], rows[3]))

    assert torch.autograd.gradcheck(size, (conv.requires_grad_(), layers.requires_grad_()), rtol=1e-6)


@pytest.mark.parametrize("relative", [False, True])
def test_macs_against_running_the_modules(relative: bool) -> None:
    static = dataclasses.replace(TINY, relative_position=relative)
    widths = Widths([5, 7], [2, 0, 3, 1], [6, 9, 0, 4], [1, 1, 0, 1], [1, 0, 1, 1])
    macs = 0
    x = torch.randn(1, 1, 103)
    for module in build_tiny(static, widths):
        if isinstance(module, nn.Conv1d) and module.groups == 1:
            x = module(x)
            macs += x.numel() * module.weight[0].numel()  # every output is a sum over one filter
    frames = x.size(-1)
    assert frames == 16
    dim, width = static.embed_dim, static.head_dim
    macs += frames * 7 * dim + frames * dim * (dim // 3) * 6
    for heads in (2, 1):  # of the four layers, one keeps its bias alone and one is gone
        query = key = value = torch.randn(frames, heads * width)
        for projected in (query, key, value):
            macs += projected.numel() * dim
        query, key = (x.view(frames, heads, width) for x in (query, key))
        weights = torch.einsum("thd,shd->hts", query, key)
        macs += weights.numel() * width  # scores
        macs += value.numel() * frames  # weighted sum
        macs += frames * dim * heads * width  # output
        if relative:
            macs += frames * heads * width * 8 + weights.numel()
    for units in (6, 4):
        macs += 2 * frames * dim * units
    assert count_macs(static, widths, 103) == macs


def test_macs_of_one_second() -> None:
    macs = count_macs(HUBERT_BASE, BASE_WIDTHS, 16000)
    pruned = dataclasses.replace(BASE_WIDTHS, ffn=[1536] * 12)
    assert macs - count_macs(HUBERT_BASE, pruned, 16000) == 12 * 49 * 768 * 3072
    with pytest.raises(ValueError, match=says("num_samples", 399)):
        count_macs(HUBERT_BASE, BASE_WIDTHS, 399)
    assert 0 < count_macs(HUBERT_BASE, BASE_WIDTHS, 400) < macs


@pytest.mark.parametrize(
    "changes, field, entries",
    [
        ({"conv": [512] * 6}, "conv", (6, 7)),
        ({"ffn": [3072] * 11}, "ffn", (11, 12)),
        ({"attention_present": [1] * 3}, "attention_present", (3, 12)),
    ],
)
def test_widths_that_do_not_fit(changes: dict, field: str, entries: tuple) -> None:
    with pytest.raises(ValueError, match=says(field, *entries)):
        count_parameters(HUBERT_BASE, dataclasses.replace(BASE_WIDTHS, **changes))
