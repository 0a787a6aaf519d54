"""Pruning by the size of weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from messages import says

from skill_fairseq.pruning.magnitude import conv_scores, ffn_scores, head_scores, prune_by_magnitude, ranks


def test_scores_are_products_of_norms() -> None:
    assert conv_scores(torch.tensor([[[3.0, 4.0]], [[0.0, 1.0]]])).tolist() == [5, 1]
    fc1, fc2 = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 7.0]])
    assert ffn_scores(fc1, fc2).tolist() == [10, 7]
    v, out = torch.tensor([[1.0], [0.0], [3.0], [4.0]]), torch.tensor([[2.0, 0.0, 0.0, 3.0]])
    assert head_scores(v, out, head_dim=2).tolist() == [2, 15]


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
    assert max(shares) - min(shares) <= 2 / 16  # whole units, of which the last few are chosen to hit the size
    heads = [len(heads) / 4 for heads in student.config.heads]
    assert max(heads) - min(heads) == 0 and abs(heads[0] - shares[-1]) <= 1 / 4

    layer, before = student.transformer.layers[1], teacher.transformer.layers[1]
    scores = ffn_scores(before.ffn.fc1.weight, before.ffn.fc2.weight)
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
