"""Students of related systems match the budget."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from budget import TOLERANCE, cost_of, plan, scaled
from grid import composed
from messages import says
from recipes import initial_student, plan_of

from skill_fairseq.checkpoints import load_encoder
from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.pruning.costs import PARAMETERS, make_cost

ROOT = Path(__file__).resolve().parents[2]
THIN = EncoderConfig(
    conv_feature_layers="[(16,10,5)] + [(32,3,2)] * 4 + [(48,2,2)] * 2",
    feature_linear=False,
    encoder_layers=4,
    encoder_embed_dim=48,
    encoder_ffn_embed_dim=96,
    encoder_attention_heads=4,
    conv_pos=16,
    conv_pos_groups=8,
)
WIDE = THIN.replace(feature_linear=True, encoder_layers=2, encoder_ffn_embed_dim=192)


def size(shape: EncoderConfig) -> int:
    return sum(p.numel() for p in SpeechEncoder(shape).parameters())


@pytest.mark.parametrize("share", [0.3, 0.6, 1.7])
@pytest.mark.parametrize("cost", ["parameters", "macs"])
def test_thin_students_are_scaled_to_the_budget(share: float, cost: str) -> None:
    measure = make_cost(cost)
    target = share * cost_of(THIN, measure)
    found = scaled(THIN, target, measure)
    assert abs(cost_of(found, measure) - target) <= TOLERANCE * target
    if cost == "parameters":
        assert size(found) == cost_of(found, measure)
    channels = [c for c, _, _ in found.conv_feature_layers]
    assert found.encoder_layers == 4 and channels[-1] == found.encoder_embed_dim and found.encoder_embed_dim % 8 == 0
    assert channels[:-1] == [round(c * found.encoder_embed_dim / 48) for c, _, _ in THIN.conv_feature_layers][:-1]
    # Of all widths, this FFN's ratio to the width is closest to the recipe's, 2.
    ratios = []
    for width in range(8, 200, 8):
        one = [THIN.replace(encoder_embed_dim=width, encoder_ffn_embed_dim=f, feature_linear=True) for f in (1, 2)]
        convs = [(max(1, round(c * width / 48)), k, s) for c, k, s in THIN.conv_feature_layers]
        convs[-1] = (width, *convs[-1][1:])
        least, more = (
            cost_of(shape.replace(conv_feature_layers=convs, conv_channels=None, feature_linear=False), measure)
            for shape in one
        )
        units = 1 + round((target - least) / (more - least))
        if units > 0 and abs(least + (units - 1) * (more - least) - target) <= TOLERANCE * target:
            ratios.append(max(units / width / 2, 2 * width / units))
    mine = found.encoder_ffn_embed_dim / found.encoder_embed_dim / 2
    assert max(mine, 1 / mine) == pytest.approx(min(ratios))


def test_a_shape_within_the_tolerance_stays_as_it_is() -> None:
    target = 1.009 * cost_of(WIDE, PARAMETERS)
    assert plan(WIDE, ["conv", "layers"], [1, 2], 6, target, PARAMETERS) == (
        type(plan(WIDE, [], None, 6, target, PARAMETERS))(WIDE, ("conv", "layers"), (1, 2))
    )


def test_copied_layers_keep_their_width() -> None:
    """More layers for a larger budget, fewer units for a smaller one."""
    full = cost_of(WIDE, PARAMETERS)
    more = plan(WIDE, ["conv", "layers"], [1, 3], 6, 1.2 * full, PARAMETERS)
    assert more.layers == (1, 3, 4) and more.shape.encoder_layers == 3 and more.cut == ("conv", "heads", "ffn")
    less = plan(WIDE, ["conv", "layers"], [1, 3], 6, 0.5 * full, PARAMETERS)
    assert less.layers == (1, 3) and less.shape == WIDE and less.cut == ("conv", "heads", "ffn")
    shared = plan(WIDE.replace(reuse_attention=[2]), ["layers"], [1, 3], 6, 0.5 * full, PARAMETERS)
    assert shared.cut == ("conv", "ffn")  # layers that share a map must keep the same heads
    with pytest.raises(ValueError, match=says("[5, 6]", "no more", "sparsity")):
        plan(WIDE, ["layers"], [5, 6], 6, 1.2 * full, PARAMETERS)
    with pytest.raises(ValueError, match=says("[1, 3]", "after any cut", "sparsity")):
        plan(WIDE, ["layers"], [1, 3], 6, 0.05 * full, PARAMETERS)


def test_copied_convolutions_are_cut_to_their_share() -> None:
    target = 0.4 * cost_of(THIN.replace(feature_linear=True), PARAMETERS)
    found = plan(THIN.replace(feature_linear=True), ["conv"], None, 6, target, PARAMETERS)
    assert found.parts == found.cut == ("conv",) and found.shape.conv_feature_layers == THIN.conv_feature_layers
    assert found.shape.encoder_embed_dim < 48 and cost_of(found.shape, PARAMETERS) > target


def test_what_no_width_reaches_is_refused() -> None:
    with pytest.raises(ValueError, match=says("4 layers", "100 parameters", "lower sparsity")):
        scaled(THIN, 100, PARAMETERS)


@pytest.mark.parametrize("name", ["distilhubert", "deep_12l_half_l2l", "starhubert"])
def test_a_shipped_recipe_starts_at_the_budget(name: str) -> None:
    teacher = load_encoder(ROOT / "examples" / "tiny" / "teacher" / "teacher.safetensors")
    recipe = composed(ROOT / "config", f"distill/tiny_{name}", [])
    student = initial_student(recipe, teacher, 0.9, PARAMETERS, 1)
    assert student is not None
    assert student.num_parameters() == pytest.approx(0.1 * teacher.num_parameters(), rel=TOLERANCE)
    again, other = (initial_student(recipe, teacher, 0.9, PARAMETERS, seed) for seed in (1, 2))
    assert again is not None and other is not None
    pairs = list(zip(student.parameters(), again.parameters()))
    assert all(torch.equal(a, b) for a, b in pairs)
    changed = not all(torch.equal(a, b) for a, b in zip(student.parameters(), other.parameters()))
    assert changed == (name != "distilhubert")  # only a LayerNorm of it is new
    if name == "distilhubert":  # its convolutions are the teacher's with the largest filters
        mine, theirs = (e.feature_extractor.layers[0].conv.weight.flatten(1) for e in (student, teacher))
        assert all((theirs == row).all(1).any() for row in mine) and len(mine) < len(theirs)


def test_gates_reach_the_budget_by_themselves() -> None:
    teacher = load_encoder(ROOT / "examples" / "tiny" / "teacher" / "teacher.safetensors").config
    recipe = composed(ROOT / "config", "distill/tiny", [])
    assert plan_of(recipe, teacher, 0.9, PARAMETERS) is None
    with pytest.raises(ValueError, match=says("sparsity", "0.97", "0.9669")):
        plan_of(recipe, teacher, 0.97, PARAMETERS)
