"""Magnitude pruning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from messages import says

from skill_fairseq.modules.units import UNITS, Site
from skill_fairseq.pruning.magnitude import prune_by_magnitude, ranks


def test_scores_are_products_of_norms(small: Any) -> None:
    encoder = small.random_encoder()
    conv, layer = encoder.feature_extractor.layers[2].conv, encoder.transformer.layers[1]
    v, out = layer.attention.v_proj.weight, layer.attention.out_proj.weight
    heads = [
        v[8 * i : 8 * i + 8].square().sum().sqrt() * out[:, 8 * i : 8 * i + 8].square().sum().sqrt() for i in range(4)
    ]
    ffn = [row.norm() * column.norm() for row, column in zip(layer.ffn.fc1.weight, layer.ffn.fc2.weight.T)]
    wanted = {
        "conv": (Site(2, "feature_extractor.layers.2", 16), [filters.norm() for filters in conv.weight]),
        "heads": (Site(1, "transformer.layers.1.attention", 4), heads),
        "ffn": (Site(1, "transformer.layers.1.ffn", 48), ffn),
    }
    for kind, (site, scores) in wanted.items():
        assert site in UNITS[kind].sites(encoder)
        torch.testing.assert_close(UNITS[kind].scores(encoder, site), torch.stack(scores))
    with pytest.raises(ValueError, match=says("units", "'ffn_layers'", "conv, heads, ffn")):
        prune_by_magnitude(encoder, 0.2, ["ffn", "ffn_layers"])


def test_ranks_are_places_whatever_the_scale() -> None:
    assert ranks(torch.tensor([30.0, 1.0, 2.0, 1.0])).tolist() == [0.875, 0.125, 0.625, 0.375]


@pytest.mark.parametrize("sparsity", [0.3, 0.6])
def test_the_smallest_go_in_equal_shares_and_the_size_is_right(small: Any, sparsity: float) -> None:
    teacher = small.random_encoder()
    student = prune_by_magnitude(teacher, sparsity, ["conv", "heads", "ffn"])
    smallest_unit = 2 * 32 + 1
    assert abs(student.num_parameters() - (1 - sparsity) * teacher.num_parameters()) <= smallest_unit
    shares = [width / full for width, (full, _, _) in zip(student.config.conv_channels, [(16, 0, 0)] * 7)]
    shares += [dim / 48 for dim in student.config.ffn_dims]
    assert max(shares) - min(shares) <= 2 / 16  # whole units, the last few of which are chosen to match the size
    heads = [len(heads) / 4 for heads in student.config.heads]
    assert max(heads) - min(heads) == 0 and abs(heads[0] - shares[-1]) <= 1 / 4

    layer, before = student.transformer.layers[1], teacher.transformer.layers[1]
    scores = before.ffn.fc1.weight.norm(dim=1) * before.ffn.fc2.weight.norm(dim=0)
    kept = scores.topk(len(layer.ffn.fc1.weight)).indices.sort().values
    torch.testing.assert_close(layer.ffn.fc1.weight, before.ffn.fc1.weight[kept])
    torch.testing.assert_close(layer.ffn.fc2.weight, before.ffn.fc2.weight[:, kept])


def test_only_what_may_go_goes(small: Any) -> None:
    student = prune_by_magnitude(small.random_encoder(), 0.2, ["ffn"])
    assert student.config.conv_channels == [16] * 7 and all(len(heads) == 4 for heads in student.config.heads)
    assert max(student.config.ffn_dims) < 48


def test_gates_are_refused(small: Any) -> None:
    with pytest.raises(ValueError, match=says("gates")):
        prune_by_magnitude(small.random_encoder(pruning_units=["ffn"]), 0.2, ["ffn"])


def test_double_precision_stays(small: Any) -> None:
    teacher = small.random_encoder().double()
    with torch.no_grad():
        teacher.transformer.layer_norm.weight.add_(1e-12)
    student = prune_by_magnitude(teacher, 0.1, ["ffn"])
    assert torch.equal(student.transformer.layer_norm.weight, teacher.transformer.layer_norm.weight)
