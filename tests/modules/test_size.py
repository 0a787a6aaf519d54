from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from messages import says
from torch import Tensor, nn

from skill_fairseq.modules.config import EncoderConfig, hubert_base, hubert_large, wavlm_base, wavlm_large
from skill_fairseq.modules.hard_concrete import keep_probability
from skill_fairseq.modules.size import count_macs, count_parameters, from_flat, widths_of
from skill_fairseq.pruning.costs import PARAMETERS, Cost, MacCost

ORACLE = json.loads((Path(__file__).parents[1] / "oracle" / "sizes.json").read_text())
EXPECTED = [
    pytest.param(name, case, id=f"{name}-{i}")
    for name, model in ORACLE["models"].items()
    for i, case in enumerate(model["expected"])
]

CONFIGS = {
    "hubert-base": hubert_base(),
    "wavlm-base": wavlm_base(),
    "hubert-large": hubert_large(),
    "wavlm-large": wavlm_large(),
}
HUBERT_BASE = CONFIGS["hubert-base"]
BASE_WIDTHS = widths_of(HUBERT_BASE)

TINY = EncoderConfig(
    conv_feature_layers=[(8, 5, 3), (8, 3, 2)],
    conv_bias=True,
    extractor_mode="layer_norm",
    encoder_layers=4,
    encoder_embed_dim=12,
    encoder_attention_heads=3,
    encoder_ffn_embed_dim=9,
    conv_pos=6,
    conv_pos_groups=3,
    relative_position=True,
    num_buckets=10,
)
PRUNED = {
    "conv": [5, 7],
    "heads": [2, 0, 3, 1],
    "ffn": [6, 9, 0, 4],
    "attention_layers": [1, 1, 0, 1],
    "ffn_layers": [1, 0, 1, 1],
}


@pytest.mark.parametrize("name", CONFIGS)
def test_full_models(name: str) -> None:
    size = count_parameters(CONFIGS[name], widths_of(CONFIGS[name]))
    assert isinstance(size, int)
    assert size == ORACLE["models"][name]["params"]


@pytest.mark.parametrize("name, case", EXPECTED)
def test_expected_size(name: str, case: dict) -> None:
    config, units = CONFIGS[name], case["gated_units"].split(",")
    full = widths_of(config)

    def gated(unit: str, kind: str, counts: list[int]) -> list[Tensor]:
        probability = torch.ones((), dtype=torch.float64)
        if unit in units:
            probability = keep_probability(torch.tensor(case["log_alpha"][kind], dtype=torch.float64))
        return [count * probability for count in counts]

    widths = {
        "conv": gated("conv", "conv", full["conv"]),
        "heads": gated("head", "head", full["heads"]),
        "ffn": gated("interm", "interm", full["ffn"]),
        "attention_layers": gated("attlayer", "layer", full["attention_layers"]),
        "ffn_layers": gated("ffnlayer", "layer", full["ffn_layers"]),
    }
    assert count_parameters(config, widths).item() == pytest.approx(case["expected_params"], rel=1e-9)
    columns = {kind: torch.stack(column) for kind, column in widths.items()}
    assert count_parameters(config, columns).item() == pytest.approx(case["expected_params"], rel=1e-9)
    assert PARAMETERS.sparsity(config, columns).item() == pytest.approx(case["sparsity"], abs=1e-9)


@pytest.mark.parametrize("case", ORACLE["pruned"])
def test_pruned_size(case: dict) -> None:
    present = {"attention_layers": "use_attention", "ffn_layers": "use_feed_forward"}
    widths = {kind: [int(x) for x in case[present.get(kind, kind)]] for kind in PRUNED}
    size = count_parameters(CONFIGS[case["model"]], widths)
    assert isinstance(size, int)
    assert size == case["params"]


def parameter(size: int) -> nn.Module:
    return nn.ParameterList([nn.Parameter(torch.zeros(size))])


def build_tiny(config: EncoderConfig, widths: dict[str, list[int]]) -> nn.ModuleList:
    """Compares with torch's own counts of a small encoder's modules."""
    dim, width, conv = config.encoder_embed_dim, config.head_dim, widths["conv"]
    norm = {
        "layer_norm": [nn.LayerNorm(c) for c in conv],
        "default": [nn.GroupNorm(conv[0], conv[0])],
    }[config.extractor_mode]
    channels = [1, *conv]
    modules: list[nn.Module] = [
        nn.Conv1d(i, o, k, s, bias=config.conv_bias)
        for i, o, (_, k, s) in zip(channels, channels[1:], config.conv_feature_layers)
    ]
    modules += [*norm, nn.LayerNorm(dim)]
    if config.feature_layer_norm:
        modules.append(nn.LayerNorm(channels[-1]))
    if config.feature_linear:
        modules.append(nn.Linear(channels[-1], dim))
    position = nn.Conv1d(dim, dim, config.conv_pos, groups=config.conv_pos_groups)
    modules += [position, parameter(config.conv_pos)]  # weight norm adds one magnitude per kernel position
    if config.relative_position:
        modules.append(nn.Embedding(config.num_buckets, config.encoder_attention_heads))
    for heads, present in zip(widths["heads"], widths["attention_layers"]):
        modules += [nn.LayerNorm(dim), nn.LayerNorm(dim)]
        if present and heads:
            modules += [nn.Linear(dim, heads * width) for _ in range(3)] + [nn.Linear(heads * width, dim)]
            if config.relative_position:
                modules += [nn.Linear(width, 8), parameter(config.encoder_attention_heads)]
        elif present:
            modules.append(parameter(dim))
    for units, present in zip(widths["ffn"], widths["ffn_layers"]):
        if present and units:
            modules += [nn.Linear(dim, units), nn.Linear(units, dim)]
        elif present:
            modules.append(parameter(dim))
    return nn.ModuleList(modules)


@pytest.mark.parametrize("mode", ["default", "layer_norm"])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("projection", ["norm and linear", "norm", "linear"])
def test_against_modules_with_removed_and_bias_only_sublayers(
    mode: str, relative: bool, bias: bool, projection: str
) -> None:
    between = {"feature_layer_norm": "norm" in projection, "feature_linear": "linear" in projection}
    widths = PRUNED if between["feature_linear"] else {**PRUNED, "conv": [5, 12]}
    config = TINY.replace(extractor_mode=mode, relative_position=relative, conv_bias=bias)
    config = config.replace(conv_feature_layers=[(8, 5, 3), (12, 3, 2)], **between)
    assert count_parameters(config, widths) == sum(p.numel() for p in build_tiny(config, widths).parameters())


SMALL = TINY.replace(encoder_layers=1, relative_position=False)
COSTS = [PARAMETERS, MacCost(0.01)]


@pytest.mark.parametrize("cost", COSTS, ids=str)
def test_expectation_is_the_mean_over_all_gates(cost: Cost) -> None:
    """The sum over all combinations of open gates, counted exactly and weighted by probability."""
    full, p = [2, 3, 2, 2, 1, 1], [0.3, 0.6, 0.8, 0.45, 0.7, 0.2]  # conv, conv, heads, ffn, attention, ffn
    like = widths_of(SMALL)
    mean = 0.0
    for counts in itertools.product(*(range(n + 1) for n in full)):
        chance = math.prod(math.comb(n, k) * q**k * (1 - q) ** (n - k) for n, k, q in zip(full, counts, p))
        exact = cost(SMALL, from_flat(list(counts), like))
        assert isinstance(exact, int)
        mean += chance * exact
    expected = cost(SMALL, from_flat(torch.tensor([n * q for n, q in zip(full, p)]).double(), like))
    assert expected.item() == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("cost", COSTS, ids=str)
def test_gradient_against_finite_differences(cost: Cost) -> None:
    flat = 3 * torch.rand(2 + 4 * 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    like = widths_of(TINY)

    def scaled(flat: Tensor) -> Tensor:  # on the order of 1
        return cost(TINY, from_flat(flat, like)) / cost.original(TINY)

    assert torch.autograd.gradcheck(scaled, (flat.requires_grad_(),), rtol=1e-6)


@pytest.mark.parametrize("relative", [False, True])
def test_macs_against_running_the_modules(relative: bool) -> None:
    config = TINY.replace(relative_position=relative)
    macs = 0
    x = torch.randn(1, 1, 103)
    for module in build_tiny(config, PRUNED):
        if isinstance(module, nn.Conv1d) and module.groups == 1:
            x = module(x)
            macs += x.numel() * module.weight[0].numel()  # every output is a sum over one filter
    frames = x.size(-1)
    assert frames == 16
    dim, width = config.encoder_embed_dim, config.head_dim
    macs += frames * 7 * dim + frames * dim * (dim // 3) * 6
    for heads in (2, 1):  # of the four layers, one keeps only its bias and one is removed
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
    assert count_macs(config, PRUNED, 103) == macs


def test_macs_of_one_second() -> None:
    macs = count_macs(HUBERT_BASE, BASE_WIDTHS, 16000)
    pruned = {**BASE_WIDTHS, "ffn": [1536] * 12}
    assert macs - count_macs(HUBERT_BASE, pruned, 16000) == 12 * 49 * 768 * 3072
    with pytest.raises(ValueError, match=says("num_samples", 399)):
        count_macs(HUBERT_BASE, BASE_WIDTHS, 399)
    assert 0 < count_macs(HUBERT_BASE, BASE_WIDTHS, 400) < macs


@pytest.mark.parametrize(
    "changes, field, entries",
    [
        ({"conv": [512] * 6}, "conv", (6, 7)),
        ({"ffn": [3072] * 11}, "ffn", (11, 12)),
        ({"attention_layers": [1] * 3}, "attention_layers", (3, 12)),
    ],
)
def test_widths_that_do_not_fit(changes: dict, field: str, entries: tuple) -> None:
    with pytest.raises(ValueError, match=says(field, *entries)):
        count_parameters(HUBERT_BASE, {**BASE_WIDTHS, **changes})
