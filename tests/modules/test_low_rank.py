"""Linear maps as two thin matrices: best approximation, counted sizes, and expectations under gates."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from oracle import RELATED, agrees, near, tensors
from torch import Tensor, nn

from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.low_rank import LowRankLinear, factorise, is_thin
from skill_fairseq.modules.rank import LINEARS
from skill_fairseq.modules.size import from_flat, widths_of
from skill_fairseq.pruning.costs import PARAMETERS, Cost, MacCost
from tests.modules.test_size import TINY

SMALL = TINY.replace(encoder_layers=1, relative_position=False, pruning_units=["rank", "heads", "ffn"])
COSTS = [PARAMETERS, MacCost(0.01)]


def test_the_start_is_the_truncated_svd() -> None:
    case = RELATED["cases"]["low_rank"]
    weight = tensors(case["inputs"])["weight"]
    up, down = factorise(weight, case["rank"])
    assert agrees(up @ down, case["approximation"])
    assert ((weight - up @ down).norm() / weight.norm()).item() == near(case["relative_error"])
    assert up.numel() + down.numel() == case["parameters_low_rank"] < weight.numel() == case["parameters_full"]
    up, down = factorise(weight, 8)
    assert (up.norm(dim=0) * down.norm(dim=1)).tolist() == near(case["singular_values"])
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))  # its root in each
    torch.testing.assert_close(up @ down, weight)
    for other in (-weight, weight[:, torch.arange(11, -1, -1)]):  # LAPACK's choice of signs has no effect
        assert all((column[column.abs().argmax()] > 0) for column in factorise(other, 8)[0].T)
    assert factorise(weight.half(), 3)[0].dtype == torch.float16


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_the_module_is_the_product(rank: int) -> None:
    torch.manual_seed(0)
    module, x = LowRankLinear(5, 7, rank), torch.randn(2, 3, 5)
    nn.init.normal_(module.up.bias)
    torch.testing.assert_close(module(x), x @ module.weight.T + module.up.bias)
    assert sum(p.numel() for p in module.parameters()) == rank * (5 + 7) + 7


def test_a_random_start_is_as_spread_as_berts() -> None:
    torch.manual_seed(0)
    assert LowRankLinear(400, 300, 50).weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_one_matrix_where_it_is_not_larger() -> None:
    assert [r for r in range(5) if is_thin(r, 4, 4)] == [0, 1]  # at rank 2 both have 16 weights
    assert [r for r in range(5) if is_thin(r, 4, 12)] == [0, 1, 2]
    assert not any(is_thin(r, 0, 4) for r in range(3))


RANKS = [2, 5, 12, 0, 3, 9, *[1] * 6, *[12, 4] * 3, 3, 3, 3, 3, 9, 2]
SHAPES: list[dict[str, Any]] = [
    {},
    {"heads": [[0, 2], [], [0, 1, 2], [1]], "ffn_dims": [4, 9, 0, 2]},
    {"heads": [[0, 2], None, [0, 1, 2], [1]], "ffn_dims": [None, 9, 0, 2]},
]


@pytest.mark.parametrize("shape", SHAPES, ids=["full", "units", "layers"])
def test_counts_are_the_modules(shape: dict[str, Any]) -> None:
    ranks = [min(r, f) for r, f in zip(RANKS, [12, 12, 12, 12, 9, 9] * 4)]
    config = TINY.replace(unit_widths={"rank": ranks}, **shape)
    encoder = SpeechEncoder(config)
    linears = [
        (place, getattr(getattr(layer, sublayer), name))
        for i, layer in enumerate(encoder.transformer.layers)
        for place, (sublayer, name) in enumerate(LINEARS, start=len(LINEARS) * i)
        if getattr(layer, sublayer) is not None and hasattr(getattr(layer, sublayer), name)
    ]
    for place, linear in linears:
        if not isinstance(linear, (nn.Linear, LowRankLinear)):
            continue  # all that is left is a bias
        weights = sum(p.numel() for n, p in linear.named_parameters() if n.endswith("weight"))
        m, n = linear.out_features, linear.in_features
        assert weights == min(ranks[place] * (m + n), m * n)
        assert isinstance(linear, LowRankLinear) == is_thin(ranks[place], m, n)
    widths = widths_of(config)
    size = PARAMETERS(config, widths)
    assert isinstance(size, int) and size == sum(p.numel() for p in encoder.parameters()) == encoder.num_parameters()
    whole, frames = config.replace(unit_widths={}), 16
    plain = widths_of(whole)
    assert MacCost(103 / 16000)(config, widths) - MacCost(103 / 16000)(whole, plain) == frames * (
        size - PARAMETERS(whole, plain)
    )
    for cost in COSTS:  # expectations of certain values are exact
        certain = from_flat(torch.tensor([float(w) for c in widths.values() for w in c]), widths)
        assert cost(config, certain).item() == pytest.approx(cost(config, widths), abs=0.5)


@pytest.mark.parametrize("cost", COSTS, ids=str)
def test_expectation_is_the_mean_over_all_gates(cost: Cost) -> None:
    """Equals the sum over all combinations of open gates, counted exactly and weighted by probability, for thin
    matrices.

    With few open heads or FFN units one matrix would be smaller, which the expectation ignores.
    """
    like = widths_of(SMALL)
    full = {"conv": [2, 3], "heads": [3], "ffn": [9], "attention_layers": [1], "ffn_layers": [1]}
    full["rank"] = [1, 1, 0, 1, 2, 1]
    p = {"heads": 0.6, "ffn": 0.8, "attention_layers": 0.7, "ffn_layers": 0.9, "rank": 0.4}
    counts = [(name, n, p.get(name, 1.0)) for name in like for n in full[name]]

    def choices(n: int, q: float) -> list[tuple[int, float]]:
        return [(k, math.comb(n, k) * q**k * (1 - q) ** (n - k)) for k in range(n + 1)] if q < 1 else [(n, 1.0)]

    mean = bound = 0.0
    for found in itertools.product(*(choices(n, q) for _, n, q in counts)):
        chance = math.prod(q for _, q in found)
        widths = from_flat([k for k, _ in found], like)
        exact = cost(SMALL, widths)
        assert isinstance(exact, int)
        mean += chance * exact
        thin = {name: list(column) for name, column in widths.items()}
        bound += chance * (exact + _frames(cost) * _excess(thin))
    expected = cost(SMALL, from_flat(torch.tensor([n * q for _, n, q in counts]).double(), like)).item()
    assert expected == pytest.approx(bound, rel=1e-6)  # two thin matrices throughout: exactly bilinear
    assert mean <= expected <= 1.01 * mean  # an FFN of one or two units would be smaller as one matrix


def _frames(cost: Cost) -> int:
    return 1 if cost is PARAMETERS else 25


def _excess(widths: dict[str, list[int]]) -> int:
    """Excess weights of two thin matrices over the smaller of both forms."""
    inner = [4 * widths["heads"][0]] * 4 + [widths["ffn"][0]] * 2
    there = [widths["attention_layers"][0]] * 4 + [widths["ffn_layers"][0]] * 2
    return sum(p * max(r * (w + 12) - 12 * w, 0) for r, w, p in zip(widths["rank"], inner, there))


@pytest.mark.parametrize("cost", COSTS, ids=str)
def test_gradient_against_finite_differences(cost: Cost) -> None:
    config = TINY.replace(pruning_units=["rank"])
    like = widths_of(config)
    flat = torch.tensor([float(w) for c in like.values() for w in c], dtype=torch.float64)
    start = len(flat) - len(like["rank"])
    generator = torch.Generator().manual_seed(0)
    flat[:start] -= 0.3 * torch.rand(start, dtype=torch.float64, generator=generator)
    flat[start:] = 3 * torch.rand(len(flat) - start, dtype=torch.float64, generator=generator)  # all thin

    def scaled(flat: Tensor) -> Tensor:  # on the order of 1
        return cost(config, from_flat(flat, like)) / cost.original(config)

    assert torch.autograd.gradcheck(scaled, (flat.requires_grad_(),), rtol=1e-6)


def test_above_the_rank_of_equal_size_a_component_has_the_price_of_thin_matrices() -> None:
    config = TINY.replace(pruning_units=["rank", "ffn"])
    flat = torch.tensor([float(w) for c in widths_of(config).values() for w in c], requires_grad=True)
    widths = from_flat(flat, widths_of(config))
    size = PARAMETERS(config, widths)
    assert size.item() == PARAMETERS.original(config)
    grads = dict(zip(widths, torch.autograd.grad(size, list(widths.values()))))
    assert grads["rank"].view(4, 6).tolist() == [[24.0] * 4 + [21.0] * 2] * 4
    assert grads["ffn"].tolist() == [25.0] * 4  # a row with its bias and a column, as in one matrix


def test_the_shape_in_a_config() -> None:
    config = EncoderConfig(**{**vars(TINY), "unit_widths": {"rank": 2}})
    assert config.unit_widths == {"rank": [2] * 24}
    assert EncoderConfig.from_dict(config.to_dict()) == config and not config.is_full() and config.full().is_full()
    assert "unit_widths" not in TINY.to_dict()
    with pytest.raises(ValueError, match="model.unit_widths.*rank"):
        TINY.replace(unit_widths={"rank": 10})  # FFNs of 9 units have no more than 9
