"""Layer-to-layer distances: DistilHuBERT's heads and loss against the reference's numbers, and all pairings by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from messages import says
from omegaconf import OmegaConf
from oracle import RELATED, agrees, near, tensor, tensors
from torch import Tensor

from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.objectives.heads import PredictionHeads
from skill_fairseq.objectives.layers import Layers, LayersConfig
from tests.conftest import SHAPE

ORACLE = RELATED["cases"]["distilhubert"]
ALONE = {"l1_weight": 0.0, "cos_weight": 0.0, "mse_weight": 0.0}


def make(student: Any = None, teacher: Any = None, **fields: Any) -> Layers:
    """The objective between encoders of these shapes, float64."""
    shapes = [EncoderConfig(**{**SHAPE, **(shape or {})}) for shape in (student, teacher)]
    cfg = OmegaConf.merge(OmegaConf.structured(LayersConfig), fields)
    torch.manual_seed(0)
    return Layers(cfg, shapes[0], shapes[1:], "criterion.objectives.layers").double()


def states(taps: Any, width: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 7, width, generator=generator, dtype=torch.float64) for _ in taps]


def deep(layers: int, width: int = 32) -> dict[str, int]:
    return {"encoder_layers": layers, "encoder_embed_dim": width}


@pytest.mark.parametrize(
    ("case", "weights"),
    [
        (0, {"l1_weight": 1.0, "cos_weight": 1.0}),
        (1, {"l1_weight": 1.0, "cos_weight": 0.0}),
        (2, {"l1_weight": 0.0, "cos_weight": 1.0, "mse_weight": 1.0}),
    ],
)
def test_distilhubert_is_the_reference(case: int, weights: dict[str, float]) -> None:
    shared, expected = ORACLE["shared"], ORACLE["cases"][case]
    inputs, w = tensors(shared["inputs"]), tensors(shared["weights"])
    fields = {"teacher_layers": [4, 8, 12], "student_layers": "last", "head": "prediction", "cos_type": "log_sig"}
    thin = {**deep(2, 6), "encoder_attention_heads": 2, "conv_pos_groups": 2}
    objective = make(thin, deep(12, 8), **fields, **weights)
    with torch.no_grad():
        objective.heads.shared.weight.copy_(w["0.weight"])
        objective.heads.shared.bias.copy_(w["0.bias"])
        for n, head in enumerate(objective.heads.heads):
            head.weight.copy_(w["2.weight"][n].T)
            head.bias.copy_(w["2.bias"][0, 0, n])
    hidden = inputs["hidden"].requires_grad_()
    predicted = torch.stack(objective.heads([hidden] * 3), 1)
    assert agrees(predicted, shared["prediction"])
    loss, log = objective([hidden] * 3, list(inputs["target"].unbind(1)))
    assert loss.item() == near(expected["loss"])
    kind = "mse" if "mse_weight" in weights else "l1"
    found = [log[f"{kind}_s2_t{layer}"].item() for layer in (4, 8, 12)]
    assert found == near(expected["reconstruction_per_head"])
    if weights["cos_weight"]:
        assert [-log[f"cos_s2_t{layer}"].item() for layer in (4, 8, 12)] == near(expected["cosine_per_head"])
    else:
        assert not any(name.startswith("cos") for name in log)
    gradients = torch.autograd.grad(loss, [hidden, *objective.heads.parameters()])
    if case == 0:
        first, bias, *others = (gradient.norm().item() for gradient in gradients[1:])
        assert gradients[0].norm().item() == near(shared["grad_norm_hidden"])
        second = [sum(norm**2 for norm in others[k::2]) ** 0.5 for k in (0, 1)]
        assert [first, bias, *second] == near(list(shared["grad_norms"].values()))


def test_os_kdft_sums_the_cosine_over_frames() -> None:
    case = RELATED["cases"]["os_kdft"]["kd"]
    fields = {"teacher_layers": [4, 8, 12], "student_layers": "last", "head": "prediction", "cos_type": "log_sig"}
    thin = {"encoder_attention_heads": 2, "conv_pos_groups": 2}
    objective = make({**deep(2, 6), **thin}, {**deep(12, 6), **thin}, **fields, layer_weights=1.0, cos_reduction="sum")
    weights = tensors(case["weights"])
    with torch.no_grad():
        for name, own in (("weight", objective.heads.shared.weight), ("bias", objective.heads.shared.bias)):
            own.copy_(torch.cat([weights[f"predict_layer.{n}.0.{name}"] for n in range(3)]))
        for n, head in enumerate(objective.heads.heads):
            head.weight.copy_(weights[f"predict_layer.{n}.2.weight"])
            head.bias.copy_(weights[f"predict_layer.{n}.2.bias"])
    state = tensor(case["inputs"]["student_states"])[:, -1].requires_grad_()
    targets = [tensor(case["inputs"]["teacher_states"])[:, layer] for layer in (4, 8, 12)]
    loss, log = objective([state] * 3, targets)
    assert loss.item() == near(case["loss"])
    assert sum(value.item() for name, value in log.items() if name.startswith("l1")) == near(case["l1_part"])
    assert torch.autograd.grad(loss, state)[0].norm().item() == near(case["grad_norm_student_last"])
    padded = [torch.cat([t, torch.randn(4, 2, 6)], 1) for t in (state, *targets)]
    mask = torch.arange(7).expand(4, 7) >= 5
    assert objective([padded[0]] * 3, padded[1:], mask)[0].item() == near(case["loss"])


def test_heads_have_the_published_sizes_and_start() -> None:
    for count, size in ((2, 2_362_368), (3, 3_543_552), (1, 1_181_184)):
        heads = PredictionHeads(768, 768, count)
        assert sum(p.numel() for p in heads.parameters()) == size
    for head in heads.heads:  # U(+-1/sqrt(768)), biases too
        for parameter in (head.weight, head.bias):
            assert parameter.abs().max() <= 768**-0.5
            assert parameter.std().item() == pytest.approx((3 * 768) ** -0.5, rel=0.1)
    assert sum(p.numel() for p in PredictionHeads(384, 768, 1).parameters()) == 443_520


@pytest.mark.parametrize(
    ("depths", "fields", "pairs"),
    [
        ((12, 12), {}, [(i, i) for i in range(1, 13)]),
        ((12, 12), {"teacher_layers": [2, 4, 6]}, [(2, 2), (4, 4), (6, 6)]),
        ((3, 12), {}, [(1, 4), (2, 8), (3, 12)]),
        ((3, 12), {"teacher_layers": [4, 8, 12]}, [(1, 4), (2, 8), (3, 12)]),
        ((12, 24), {"student_layers": [6, 12]}, [(6, 12), (12, 24)]),
        ((3, 12), {"student_layers": "last", "teacher_layers": [4, 12]}, [(3, 4), (3, 12)]),
        ((3, 12), {"student_layers": "last"}, [(3, 12)]),
        ((3, 12), {"student_layers": [0, 1], "teacher_layers": [0, 7]}, [(0, 0), (1, 7)]),
        ((4, 2), {}, [(1, 1), (2, 1), (3, 2), (4, 2)]),
    ],
)
def test_which_layer_learns_from_which(depths: Any, fields: Any, pairs: list) -> None:
    objective = make(deep(depths[0]), deep(depths[1]), **fields)
    assert objective.pairs == pairs
    taps = [[tap.layers[0] for tap in side] for side in (objective.student_taps, objective.teacher_taps)]
    assert list(zip(*taps)) == pairs
    saved = OmegaConf.to_container(objective.cfg)
    assert [saved["student_layers"], saved["teacher_layers"]] == taps
    again = make(deep(depths[0]), deep(depths[1]), **saved)
    assert again.pairs == pairs and again.settings(saved) == objective.settings(saved)


@pytest.mark.parametrize(
    ("weights", "factors"), [(None, [1 / 3] * 3), (1.0, [1.0] * 3), ([0.1, 0.1, 1.0], [0.1, 0.1, 1.0])]
)
def test_layer_to_layer_by_hand(weights: Any, factors: list[float]) -> None:
    """One linear map per pair; mean, sum or weighted sum over layers; three distances together."""
    objective = make(deep(3, 16), None, l1_weight=0.5, mse_weight=2.0, cos_weight=0.25, layer_weights=weights)
    own, theirs = states(objective.student_taps, 16, 0), states(objective.teacher_taps, 32, 1)
    loss, log = objective(own, theirs)
    wanted = 0.0
    for i in range(3):
        p = own[i] @ objective.heads[i].weight.T + objective.heads[i].bias
        l1, mse = (p - theirs[i]).abs().mean(), (p - theirs[i]).square().mean()
        cos = (F.normalize(p, dim=-1) * F.normalize(theirs[i], dim=-1)).sum(-1).mean()
        wanted += factors[i] * (0.5 * l1 + 2.0 * mse - 0.25 * cos)
        named = f"s{i + 1}_t{i + 1}"
        assert [log[f"{n}_{named}"].item() for n in ("l1", "mse", "cos")] == near([l1.item(), mse.item(), cos.item()])
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)


@pytest.mark.parametrize("head", ["identity", "linear", "prediction"])
def test_padding_and_what_is_in_it_change_nothing(head: str) -> None:
    last = {"student_layers": "last", "teacher_layers": [1, 3]} if head == "prediction" else {}
    objective = make(head=head, mse_weight=0.5, **last)
    own, theirs = states(objective.student_taps, 32, 0), states(objective.teacher_taps, 32, 1)
    own = [own[0]] * len(own) if last else own
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    kept = [[torch.cat([s[0], s[1, :4]])[None] for s in side] for side in (own, theirs)]
    wanted, _ = objective(*kept)
    for side in (own, theirs):
        for state in side:
            state[1, 4:] = float("nan")
    found, _ = objective(own, theirs, padding)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)


def test_states_of_teachers_whose_norm_comes_first_are_normalised() -> None:
    """As for layer groups; the published teachers are of the other kind, and their states are not normalised."""
    for first, chosen, normalized in ((False, None, False), (True, None, True), (True, False, False)):
        objective = make(None, {"layer_norm_first": first}, normalize_states=chosen)
        taps = [*objective.student_taps, *objective.teacher_taps]
        assert {tap.normalize for tap in taps} == {normalized} == {objective.cfg.normalize_states}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"teacher_layers": [4, 8]}, ["teacher_layers", "[4, 8]", "0 to 3"]),
        ({"teacher_layers": []}, ["teacher_layers", "[]"]),
        ({"teacher_layers": "all"}, ["teacher_layers", "all", "list"]),
        ({"teacher_layers": [1, True]}, ["teacher_layers", "True"]),
        ({"student_layers": "first"}, ["student_layers", "first", "same", "last"]),
        ({"student_layers": [1, 4]}, ["student_layers", "[1, 4]", "0 to 3"]),
        ({"student_layers": [1], "teacher_layers": [1, 2]}, ["student_layers", "[1]", "2 layers", "teacher_layers"]),
        ({"student_layers": [1, 1], "teacher_layers": [2, 2]}, ["teacher_layers", "[2, 2]", "once"]),
        ({"head": "mlp"}, ["head", "mlp", "identity", "linear", "prediction"]),
        ({"head": "prediction"}, ["head", "student_layers", "[1, 2, 3]", "last"]),
        ({"l1_weight": -1.0}, ["l1_weight", "-1.0", "at least 0"]),
        (ALONE, ["l1_weight", "mse_weight", "cos_weight", "nothing"]),
        ({"cos_reduction": "max"}, ["cos_reduction", "'max'", "mean or sum"]),
        ({"cos_reduction": "sum", "mask_prob": 0.5}, ["cos_reduction: sum", "mask_prob=0.5"]),
        ({"cos_type": "sig"}, ["cos_type", "sig", "log_sig"]),
        ({"layer_weights": [1.0]}, ["layer_weights", "[1.0]", "3 numbers"]),
        ({"layer_weights": 0.0}, ["layer_weights", "not all 0"]),
    ],
)
def test_what_is_refused(fields: dict, said: list) -> None:
    with pytest.raises(ValueError, match=says("criterion.objectives.layers." + said[0], *said[1:])):
        make(**fields)


def test_the_identity_needs_equal_widths() -> None:
    with pytest.raises(ValueError, match=says("criterion.objectives.layers.head", "identity", 16, 32, "linear")):
        make(deep(3, 16), None, head="identity")


HINTS, MASKING = RELATED["cases"]["fithubert"]["hints"], RELATED["cases"]["armhubert"]["masking"]
SQUARED = {"l1_weight": 0.0, "cos_weight": 0.0, "mse_weight": 1.0, "layer_weights": {"last": 1.0, "others": 0.1}}
SPANS = {"mask_prob": 0.4, "mask_length": 2}


def of_layers(inputs: dict[str, Tensor], whose: str) -> list[Tensor]:
    return [inputs[f"{whose}_layer_{i}"] for i in (1, 2, 3)]


def norms(gradients: Any) -> list[float]:
    return [gradient.norm().item() for gradient in gradients]


def test_fithuberts_hints_are_the_reference() -> None:
    """An odd last frame of the teacher has no counterpart."""
    thin = {**deep(3, 8), "encoder_attention_heads": 2, "conv_pos_groups": 2, "time_reduction": 2}
    wide = {**deep(3, 10), "encoder_attention_heads": 2, "conv_pos_groups": 2}
    objective = make(thin, wide, head="upsample_linear", **SQUARED)
    weights = tensors(HINTS["weights"])
    objective.heads.load_state_dict({name.replace("lin_proj", "linear"): value for name, value in weights.items()})
    inputs = tensors(HINTS["inputs"])
    own, theirs = [state.requires_grad_() for state in of_layers(inputs, "student")], of_layers(inputs, "teacher")
    for predicted, expected in zip(objective.heads(own), HINTS["projections"]):
        assert predicted.shape[1] == HINTS["upsampled_frames"] and agrees(predicted, expected)
    loss, log = objective(own, theirs)
    assert loss.item() == near(HINTS["loss"])
    found = [weight * log[f"mse_s{i}_t{i}"].item() for i, weight in zip((1, 2, 3), (0.1, 0.1, 1.0))]
    assert found == near(HINTS["per_layer_weighted"])
    gradients = torch.autograd.grad(loss, [*own, *objective.heads.parameters()])
    assert norms(gradients[:3]) == near(HINTS["grad_norms_student"])
    named = {name: value.norm().item() for (name, _), value in zip(objective.heads.named_parameters(), gradients[3:])}
    expected = {name.replace("lin_proj", "linear"): value for name, value in HINTS["grad_norms_heads"].items()}
    assert named == near(expected)


def test_reduced_frames_that_are_padding_count_for_nothing() -> None:
    """At the teacher's rate, an utterance's loss is the same alone and with a longer one."""
    objective = make({**deep(3), "time_reduction": 2}, head="upsample_linear")
    generator = torch.Generator().manual_seed(0)
    own = [torch.randn(2, 4, 32, generator=generator, dtype=torch.float64) for _ in range(3)]
    theirs = [torch.randn(2, 9, 32, generator=generator, dtype=torch.float64) for _ in range(3)]
    losses = []
    for row, frames in ((0, 4), (1, 2)):  # of 9 and 5 frames
        cut = [state[row : row + 1, :frames] for state in own], [t[row : row + 1, : 2 * frames + 1] for t in theirs]
        losses.append(objective(*cut)[0].item())
    padding = torch.zeros(2, 4, dtype=torch.bool)
    padding[1, 2:] = True
    for state in own:
        state[1, 2:] = float("nan")
    for state in theirs:
        state[1, 5:] = float("nan")
    assert objective(own, theirs, padding)[0].item() == pytest.approx((4 * losses[0] + 2 * losses[1]) / 6, rel=1e-12)


@pytest.mark.parametrize("l1", [False, True])
def test_masking_distillation_is_the_reference(l1: bool) -> None:
    inputs = tensors(MASKING["inputs"])
    shape = {**deep(3, 5), "encoder_attention_heads": 1, "conv_pos_groups": 1}
    distance = {**SQUARED, "l1_weight": 1.0, "mse_weight": 0.0} if l1 else SQUARED
    objective = make(shape, shape, head="identity", **distance, **SPANS)
    own = [state.requires_grad_() for state in of_layers(inputs, "student")]
    whole, hidden = of_layers(inputs, "teacher"), of_layers(inputs, "teacher_masked")
    mask = torch.zeros(3, 6, dtype=torch.bool)
    for row, frames in zip(mask, MASKING["masked_frames"]):
        row[frames] = True
    loss, _ = objective(own, [*whole, *hidden], None, {"masked": {objective.masking: mask}})
    assert loss.item() == near(MASKING["loss_l1" if l1 else "loss"])
    if not l1:
        assert norms(torch.autograd.grad(loss, own)) == near(MASKING["grad_norms"])
        # In validation no tap is masked.
        assert objective(own, [*whole, *whole])[0].item() == near(MASKING["validation_loss_without_mask"])


@pytest.mark.parametrize("masked_frames", ["whole", "masked", None])
@pytest.mark.parametrize("unmasked_frames", ["whole", "masked", None])
@pytest.mark.parametrize("padded", [False, True])
def test_what_frames_are_compared_with_by_hand(masked_frames: Any, unmasked_frames: Any, padded: bool) -> None:
    fields = {"masked_frames": masked_frames, "unmasked_frames": unmasked_frames}
    if masked_frames is None and unmasked_frames is None:
        with pytest.raises(ValueError, match=says("criterion.objectives.layers.masked_frames", "null", "set one")):
            make(head="identity", **SPANS, **fields)
        return
    objective = make(head="identity", mse_weight=0.5, **SPANS, **fields)
    kinds = [kind for kind in ("whole", "masked") if kind in fields.values()]
    assert [tap.layers for tap in objective.teacher_taps] == [(1,), (2,), (3,)] * len(kinds)
    assert [tap.masking is not None for tap in objective.teacher_taps[::3]] == [kind == "masked" for kind in kinds]
    assert {tap.masking for tap in objective.student_taps} == {objective.masking}
    own = states(objective.student_taps, 32, 0)
    heard = {kind: states(range(3), 32, seed) for seed, kind in enumerate(kinds, 1)}
    mask = torch.tensor([[1, 1, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0, 0]]).bool()
    padding = torch.zeros(2, 7, dtype=torch.bool)
    if padded:
        padding[1, 5:] = True
        for state in [*own, *(state for kind in kinds for state in heard[kind])]:
            state[padding] = float("nan")
    loss, _ = objective(
        own,
        [s for kind in kinds for s in heard[kind]],
        padding if padded else None,
        {"masked": {objective.masking: mask}},
    )
    wanted = 0.0
    for row in range(2):
        for frame in range(7):
            kind = masked_frames if mask[row, frame] else unmasked_frames
            if padding[row, frame] or kind is None:
                continue
            for i in range(3):
                p, t = own[i][row, frame], heard[kind][i][row, frame]
                cos = F.cosine_similarity(p, t, dim=0)
                wanted += ((p - t).abs().mean() + 0.5 * (p - t).square().mean() - cos) / 3
    assert loss.item() == pytest.approx(wanted.item() / int((~padding).sum()), rel=1e-12)


def test_where_no_frame_is_compared_the_loss_is_zero() -> None:
    objective = make(head="identity", unmasked_frames=None, **SPANS)
    own, theirs = states(range(3), 32, 0), states(range(3), 32, 1)
    own = [state.requires_grad_() for state in own]
    loss, _ = objective(own, theirs, None, {"masked": {objective.masking: torch.zeros(2, 7, dtype=torch.bool)}})
    assert loss.item() == 0 and all(not gradient.any() for gradient in torch.autograd.grad(loss, own))


@pytest.mark.parametrize(
    ("student", "fields", "said"),
    [
        ({}, {"masked_frames": None}, ["masked_frames", "None does nothing", "mask_prob=0"]),
        ({}, {"unmasked_frames": "whole"}, ["unmasked_frames", "whole does nothing", "mask_prob=0"]),
        ({}, {"mask_min_space": 2}, ["mask_min_space", "2 does nothing", "mask_prob=0"]),
        ({}, {**SPANS, "masked_frames": "clean"}, ["masked_frames", "clean", "whole, masked or null"]),
        ({}, {"layer_weights": {"last": 1.0}}, ["layer_weights", "{'last': 1.0}", "others"]),
        ({}, {"layer_weights": {"last": -1.0, "others": 0.1}}, ["layer_weights", "-1.0", "3 numbers >= 0"]),
        ({}, {"head": "upsample_linear"}, ["head", "upsample_linear", "1 of the teacher's", "without up-sampling"]),
        ({"time_reduction": 2}, {"head": "linear"}, ["head", "linear", "2 of the teacher's", "upsample_linear"]),
    ],
)
def test_what_is_refused_of_masks_and_rates(student: dict, fields: dict, said: list) -> None:
    with pytest.raises(ValueError, match=says("criterion.objectives.layers." + said[0], *said[1:])):
        make(student, **fields)
