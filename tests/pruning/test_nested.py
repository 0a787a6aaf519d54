"""Sizes of one encoder: exact and nested; slices of shared weights compute what the cut student computes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from messages import says

from skill_fairseq.checkpoints import load_encoder
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.hard_concrete import kept_units
from skill_fairseq.modules.size import widths_of
from skill_fairseq.pruning.costs import PARAMETERS, Cost, MacCost
from skill_fairseq.pruning.elastic import ElasticConstraint, NestedSizes, Sizes
from skill_fairseq.pruning.gating import gate
from skill_fairseq.pruning.nested import (
    NestedOrder,
    cut_sizes,
    is_settled,
    nested_selections,
    range_of,
    settle,
    staying,
)
from skill_fairseq.pruning.selection import Selection, apply_selection
from skill_fairseq.pruning.shrink import cut_units
from tests.pruning.test_shrink import BASE, LARGE, gated_encoder

TEACHER = Path(__file__).resolve().parents[2] / "examples" / "tiny" / "teacher" / "teacher.safetensors"
UNITS = ("conv", "heads", "ffn")
SIZES = (0.7, 0.6, 0.5, 0.47, 0.4)


def left(encoder: SpeechEncoder, cost: Cost = PARAMETERS) -> float:
    return 1 - float(cost.sparsity(encoder.config, widths_of(encoder.config)))


def by_name(encoder: SpeechEncoder, mask: torch.Tensor) -> Selection:
    gates = dict(encoder.named_gates())
    return dict(zip(gates, mask.split([gate.num_units for gate in gates.values()])))


@pytest.mark.parametrize("cost", [PARAMETERS, MacCost(2.0)], ids=str)
@pytest.mark.parametrize("shape", [BASE, LARGE], ids=["base", "large"])
@pytest.mark.parametrize("units", [UNITS, (*UNITS, "attention_layers", "ffn_layers")], ids=["units", "sublayers"])
def test_sizes_are_exact_and_nested(shape: dict, units: tuple, cost: Cost) -> None:
    gated = gated_encoder(shape, units)
    selections = nested_selections(gated, SIZES, cost)
    students = cut_sizes(gated, SIZES, cost)
    for size, student in zip(SIZES, students):
        # A unit of these small encoders is up to a percent of the whole.
        assert left(student, cost) == pytest.approx(size, abs=8e-3) and student.gates is None
    for larger, smaller in zip(selections, selections[1:]):
        assert all((larger[name] | ~smaller[name]).all() for name in larger)
        assert any((larger[name] & ~smaller[name]).any() for name in larger)
    shuffled = nested_selections(gated, SIZES[::-1], cost)[::-1]
    assert all(torch.equal(a[name], b[name]) for a, b in zip(selections, shuffled) for name in a)


@pytest.mark.parametrize("cost", [PARAMETERS, MacCost()], ids=str)
def test_sizes_of_the_small_teacher_are_exact_to_a_tenth_of_a_percent(cost: Cost) -> None:
    encoder = load_encoder(TEACHER)
    gates = gate(encoder, UNITS).encoder.gates
    gates.log_alpha.data.copy_(2 * torch.randn(len(gates.log_alpha), generator=torch.Generator().manual_seed(0)))
    sizes = [0.5, 0.4, 0.3, 0.25, 0.24, 0.1, 0.05]
    for size, student in zip(sizes, cut_sizes(encoder, sizes, cost)):
        assert left(student, cost) == pytest.approx(size, abs=1e-3)


def test_a_unit_goes_at_the_shift_at_which_rounding_lets_it_go() -> None:
    gated = gated_encoder(BASE, UNITS, spread=3.0)
    stays = staying(gated).split([gate.num_units for _, gate in gated.named_gates()])
    compared = 0
    for fall in (-7.3, -2.1, 0.0, 0.9, 4.4):
        for (_, vector), times in zip(gated.named_gates(), stays):
            if (times - fall).abs().min() > 0.01:
                wanted = kept_units(vector.log_alpha.double() - fall)
                goes = ~times.isinf()  # convolutions always keep one channel
                assert torch.equal((times > fall)[goes], wanted[goes])
                assert (~goes).sum() == (vector.unit == "conv")
                compared += 1
    assert compared > 50


def test_the_largest_size_of_stage_2_is_what_stage_1_cuts_and_keeps_its_order() -> None:
    gated = gated_encoder(BASE, UNITS)
    (cut,), big, source = cut_sizes(gated, [0.6]), settle(gated, 0.6), torch.randn(2, 4000)
    assert is_settled(big) and not is_settled(gated) and left(big) == pytest.approx(0.6, abs=2e-3)
    for mode in (big.eval(), big.train()):
        assert torch.equal(mode(source).x, cut.eval()(source).x)
    (mask,) = nested_selections(gated, [0.6])
    kept = torch.cat([mask[name] for name, _ in gated.named_gates()])
    before, after = (torch.sort(x, stable=True).indices for x in (staying(gated)[kept], big.gates.log_alpha.detach()))
    assert torch.equal(before, after)
    again = settle(gated, 0.6)
    assert torch.equal(again.gates.log_alpha, big.gates.log_alpha)


@pytest.mark.parametrize("shape", [BASE, LARGE], ids=["base", "large"])
@pytest.mark.parametrize("training", [False, True])
def test_slices_of_shared_weights_compute_what_the_cut_student_computes(shape: dict, training: bool) -> None:
    big = settle(gated_encoder(shape, UNITS), 0.7).train(training)
    sizes = NestedSizes(Sizes(0.4, 0.7))
    source = torch.randn(2, 4000)
    found = []
    for size in (0.4, 0.55, 0.7):
        values = sizes.log_alpha(big, size, 0)
        mask = torch.ones(len(big.gates.log_alpha), dtype=torch.bool) if values is None else values > 0
        student = cut_units(big, by_name(big, mask))
        assert left(student) == pytest.approx(size, abs=0.01)  # a head's cost
        out, wanted = big(source, draw=big.draw_gates(values)), student(source)
        assert (out.x - wanted.x).abs().max() < 1e-5
        for state, other in zip(out.hidden_states, wanted.hidden_states):
            assert (state - other).abs().max() < 1e-5 * max(1.0, float(other.abs().max()))
        found.append(out.x.detach())
    assert (found[0] - found[2]).abs().max() > 1e-3
    big.train()(source, draw=big.draw_gates(sizes.log_alpha(big, 0.4, 0))).x.sum().backward()
    ffn = big.transformer.layers[-1].ffn
    closed = sizes.log_alpha(big, 0.4, 0)[ffn.gate.part] < 0
    assert closed.any() and not ffn.fc1.weight.grad[closed].any() and ffn.fc1.weight.grad[~closed].any()


def test_a_size_of_stage_1_is_its_evaluation_at_that_size() -> None:
    gated = gated_encoder(BASE, UNITS)
    constraint, source = ElasticConstraint(Sizes(0.4, 0.7)), torch.randn(2, 4000)
    constraint.impose(gated, 0)
    values = constraint.log_alpha(gated, 0.5, 0)
    (selection,), (student,) = nested_selections(gated, [0.5]), cut_sizes(gated, [0.5])
    shifted = copy.deepcopy(gated)
    shifted.gates.log_alpha.data.copy_(values.detach())
    rounded = shifted.draw_gates()
    assert torch.equal(rounded.z, gated.draw_gates(values).z)
    apply_selection(shifted, selection)
    assert (shifted(source).x - student(source).x).abs().max() < 1e-5


def test_a_larger_size_counts_in_other_costs() -> None:
    gated, macs = gated_encoder(BASE, UNITS), MacCost(2.0)
    low, high = range_of(gated, (0.4, 0.6), PARAMETERS, macs)
    assert [left(student, macs) for student in cut_sizes(gated, [0.4, 0.6])] == pytest.approx([low, high])
    assert range_of(gated, (0.4, 0.6), macs, macs) == (0.4, 0.6)


def test_masks_are_nested_and_near_their_size() -> None:
    order = NestedOrder(gated_encoder(BASE, UNITS))
    masks = [order.mask(size) for size in (0.3, 0.4, 0.5, 0.9)]
    assert all((larger | ~smaller).all() and larger.sum() > smaller.sum() for smaller, larger in zip(masks, masks[1:]))


def test_a_size_that_cannot_be_reached_is_refused() -> None:
    with pytest.raises(ValueError, match=says("size", "cannot be reached", "gates on")):
        nested_selections(gated_encoder(BASE, UNITS), [0.01])
