"""Padding masks: refused or interpreted correctly, with both rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from messages import says
from torch import Tensor

from skill_fairseq.modules.padding import padding_of_attention_mask
from skill_fairseq.modules.taps import Tap
from tests.conftest import random_encoder

RULES = ("chunks", "convolution")


def batch() -> tuple[Tensor, Tensor]:
    """(2, N) noise and its mask: the second utterance ends in the middle."""
    source = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0))
    return source, torch.arange(4000) >= torch.tensor([[4000], [2000]])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32])
@pytest.mark.parametrize("padded", [True, False])
def test_masks_of_another_type_are_refused(rule: str, dtype: torch.dtype, padded: bool) -> None:
    encoder = random_encoder(padding_rule=rule)
    source, mask = batch()
    mask = (mask if padded else torch.zeros_like(mask)).to(dtype)
    for call in (encoder, lambda *inputs: encoder.tap(*inputs, [Tap((1,))])):
        with pytest.raises(TypeError, match=says("padding_mask", dtype, "(2, 4000)", "bool", "attention_mask == 0")):
            call(source, mask)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(2, 3999), (2, 12), (1, 4000), (3, 4000), (4000,)])
def test_masks_of_another_shape_are_refused(rule: str, shape: tuple[int, ...]) -> None:
    encoder = random_encoder(padding_rule=rule)
    source, _ = batch()
    for call in (encoder, lambda *inputs: encoder.tap(*inputs, [Tap((1,))])):
        with pytest.raises(ValueError, match=says("padding_mask", shape, "(2, 4000)")):
            call(source, torch.zeros(shape, dtype=torch.bool))


@pytest.mark.parametrize("rule", RULES)
def test_masks_that_mean_something_else_are_refused(rule: str) -> None:
    encoder = random_encoder(padding_rule=rule)
    source, mask = batch()
    gap = torch.zeros_like(mask)
    gap[1, 10:20] = True
    for wrong, row, said in (
        (~mask, 0, "starts"),  # True = audio
        (torch.ones_like(mask), 0, "starts"),
        (mask.flip(1), 1, "starts"),  # padding on the left
        (gap, 1, "audio after padding"),
    ):
        for call in (encoder, lambda *inputs: encoder.tap(*inputs, [Tap((1,))])):
            with pytest.raises(ValueError, match=says("padding_mask", f"row {row}", said)):
                call(source, wrong)


def test_no_mask_at_all_is_another_type() -> None:
    wrong: Any = [[False] * 4000] * 2
    with pytest.raises(TypeError, match=says("padding_mask", "list")):
        random_encoder()(batch()[0], wrong)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.float32])
def test_attention_masks_of_transformers(dtype: torch.dtype) -> None:
    source, mask = batch()
    assert torch.equal(padding_of_attention_mask((~mask).to(dtype), source), mask)
    with pytest.raises(ValueError, match=says("attention_mask", "(2, 100)", "(2, 4000)")):
        padding_of_attention_mask((~mask)[:, :100].to(dtype), source)


def test_attention_masks_that_are_added_to_scores_are_refused() -> None:
    source, mask = batch()
    with pytest.raises(ValueError, match=says("attention_mask", "torch.float32", "0 and 1")):
        padding_of_attention_mask(torch.zeros(mask.shape).masked_fill(mask, float("-inf")), source)
