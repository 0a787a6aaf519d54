"""STaR's temporal Gram matrices and averaged attention maps, against the reference's numbers and by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from messages import says
from omegaconf import OmegaConf
from oracle import RELATED, near, tensors
from torch import Tensor

from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.objectives.gram import (
    AttentionMaps,
    GramConfig,
    TemporalGram,
    attention_distance,
    gram_distance,
)
from skill_fairseq.objectives.layers import PairsConfig
from tests.conftest import SHAPE

ORACLE = RELATED["cases"]["star"]
FIELD = "criterion.objectives.star"


def make(cls: Any = TemporalGram, config: Any = GramConfig, layers: tuple[int, int] = (3, 3), **fields: Any) -> Any:
    shapes = [EncoderConfig(**{**SHAPE, "encoder_layers": depth}) for depth in layers]
    return cls(OmegaConf.merge(OmegaConf.structured(config), fields), shapes[0], shapes[1:], FIELD)


def oracle_states() -> tuple[list[Tensor], list[Tensor]]:
    given = tensors(ORACLE["tgm"]["inputs"])
    student, teacher = ([given[f"{who}_{i}"] for i in range(4)] for who in ("student", "teacher"))
    return [state.requires_grad_() for state in student], teacher


def test_gram_matrices_are_the_reference() -> None:
    expected, (student, teacher) = ORACLE["tgm"], oracle_states()
    loss, log = make()(student, teacher)
    assert [tap.layers for tap in make().student_taps] == [(0,), (1,), (2,), (3,)]
    assert log["layer_wise"].item() == near(expected["layer_wise"])
    assert log["intra_layer"].item() == near(expected["intra_layer"])
    assert loss.item() == near(expected["total"])
    norms = [gradient.norm().item() for gradient in torch.autograd.grad(loss, student)]
    assert norms == near(expected["grad_norms_student"])
    each = [gram_distance((s, s), (t, t)).item() for s, t in zip(student, teacher)]
    assert each == near(expected["layer_wise_mean_per_state"])
    between = zip(student, student[1:], teacher, teacher[1:])
    intra = [gram_distance((s, u), (t, v)).item() for s, u, t, v in between]
    assert intra == near(expected["intra_mean_per_layer"])
    entries = 6 * 6  # the paper's sums, as quoted by the reimplementation
    assert entries * sum(each[1:]) == near(expected["paper_sums"]["layer_wise_1_to_L"])
    assert entries * sum(intra) == near(expected["paper_sums"]["intra_1_to_L"])


def test_weights_of_the_terms() -> None:
    student, teacher = oracle_states()
    _, log = make()(student, teacher)
    loss, _ = make(layer_weight=0.25, intra_weight=3.0)(student, teacher)
    assert loss.item() == pytest.approx((0.25 * log["layer_wise"] + 3 * log["intra_layer"]).item(), rel=1e-12)
    alone, only = make(intra_weight=0.0)(student, teacher)
    assert torch.equal(alone, log["layer_wise"]) and set(only) == {"layer_wise"}


def test_half_precision_is_raised_first() -> None:
    """Entries are squared norms, which float16 cannot hold."""
    x = torch.full((1, 3, 64), 60.0, dtype=torch.float16)
    found = gram_distance((x, x), (x.float(), 2 * x.float()))
    assert found.dtype == torch.float32 and found.item() == pytest.approx((64 * 3600.0) ** 2, rel=1e-6)


def test_padding_changes_nothing() -> None:
    """Each utterance's own mean, weighted by its frames, as if unpadded; values in the padding do not matter."""
    student, teacher = oracle_states()
    student = [state.detach().clone() for state in student]
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    objective = make()
    parts = [
        objective([s[b : b + 1, :n] for s in student], [t[b : b + 1, :n] for t in teacher])[0].item()
        for b, n in ((0, 6), (1, 4))
    ]
    for state in (*student, *teacher):
        state[1, 4:] = float("nan")
    for state in student:
        state.requires_grad_()
    loss, _ = objective(student, teacher, padding)
    assert loss.item() == pytest.approx((6 * parts[0] + 4 * parts[1]) / 10, rel=1e-12)
    for gradient in torch.autograd.grad(loss, student):
        assert gradient[1, 4:].abs().max() == 0 and gradient[1, :4].abs().max() > 0


def test_other_depths_pair_layers_in_proportion() -> None:
    objective = make(layers=(3, 12))
    assert [tap.layers for tap in objective.teacher_taps] == [(0,), (4,), (8,), (12,)]
    assert OmegaConf.to_container(objective.cfg)["teacher_layers"] == [0, 4, 8, 12]


def test_attention_maps_are_the_reference() -> None:
    """The report sums over query frames, the objective takes their mean."""
    expected, given = ORACLE["attention"], tensors(ORACLE["attention"]["inputs"])
    logits = [given[f"student_logits_{i}"].requires_grad_() for i in (1, 2, 3)]
    student = [x.softmax(-1).mean(1) for x in logits]
    teacher = [given[f"teacher_logits_{i}"].softmax(-1).mean(1) for i in (1, 2, 3)]
    objective = make(AttentionMaps, PairsConfig)
    assert [(tap.layers, tap.kind) for tap in objective.student_taps] == [((i,), "mean_map") for i in (1, 2, 3)]
    loss, _ = objective(student, teacher)
    assert 6 * loss.item() == near(expected["loss"])
    assert [6 * attention_distance(s, t).item() for s, t in zip(student, teacher)] == near(expected["per_layer"])
    norms = [gradient.norm().item() for gradient in torch.autograd.grad(6 * loss, logits)]
    assert norms == near(expected["grad_norms_student_logits"])


def test_padded_queries_and_keys_count_nothing() -> None:
    given = tensors(ORACLE["attention"]["inputs"])
    maps = [given[f"{who}_logits_1"].mean(1)[:, :4, :4].softmax(-1) for who in ("student", "teacher")]
    wanted = attention_distance(*maps).item()
    padded = [torch.full((2, 6, 6), float("nan"), dtype=torch.float64) for _ in maps]
    for whole, part in zip(padded, maps):
        whole[:, :4] = 0.0
        whole[:, :4, :4] = part
    padding = torch.arange(6).expand(2, 6) >= 4
    assert attention_distance(*padded, padding).item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"layer_weight": 0.0, "intra_weight": 0.0}, ["layer_weight", "intra_weight", "nothing"]),
        ({"intra_weight": -2.0}, ["intra_weight", "-2.0", "at least 0"]),
        ({"teacher_layers": [3]}, ["intra_weight", "teacher_layers", "[3]", "two"]),
        ({"teacher_layers": [0, 4]}, ["teacher_layers", "[0, 4]", "0 to 3"]),
    ],
)
def test_what_is_refused(fields: dict, said: list) -> None:
    with pytest.raises(ValueError, match=says(f"{FIELD}.{said[0]}", *said[1:])):
        make(**fields)
