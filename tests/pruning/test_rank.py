"""Ranks of linear maps as prunable units: the cut encoder computes the same and has the counted size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_models import huggingface
from messages import says
from torch import nn

from skill_fairseq import pruning
from skill_fairseq.checkpoints import load_encoder, save_encoder
from skill_fairseq.exporting.describe import as_rows, describe
from skill_fairseq.exporting.model_card import model_card
from skill_fairseq.models.student_init import make_student
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.low_rank import LowRankLinear
from skill_fairseq.modules.rank import LINEARS
from skill_fairseq.modules.size import widths_of
from skill_fairseq.pruning.costs import PARAMETERS, Cost, MacCost
from skill_fairseq.pruning.expected import expected_sparsity, expected_widths
from skill_fairseq.pruning.lagrangian import CostConstraint
from skill_fairseq.pruning.magnitude import prune_by_magnitude
from skill_fairseq.pruning.selection import apply_selection, select_units
from skill_fairseq.pruning.shrink import kept_tables, shrink
from skill_fairseq.reporting.encoder_sections import units_section
from tests.conftest import LARGE_STYLE, random_encoder, waves
from tests.pruning.test_shrink import assert_same_outputs

ALL = ["conv", "heads", "ffn", "attention_layers", "ffn_layers", "rank"]
KINDS = [["rank"], ["heads", "ffn", "rank"], ALL]


def gated_encoder(units: list[str], seed: int = 0, **changes: Any) -> SpeechEncoder:
    """Random weights and scattered gates; a layer's attention, a layer's FFN, and some ranks are closed."""
    encoder = random_encoder(**changes)
    pruning.gate(encoder, units)
    generator = torch.Generator().manual_seed(seed)
    gates = dict(encoder.named_gates())
    for name, gate in gates.items():
        scattered = 2 * torch.randn(gate.num_units, generator=generator)
        gate.log_alpha.data.copy_(scattered + (3.0 if gate.unit != "rank" else -2.0 * ("layers.1" in name)))
    closed = ("1.attention.output_gate", "2.ffn.output_gate", "2.attention.gate", "1.ffn.gate", "0.ffn.fc1.gate")
    for name in closed:
        if f"transformer.layers.{name}" in gates:
            gates[f"transformer.layers.{name}"].log_alpha.data.fill_(-9.0)
    if "rank" in units:
        gates["transformer.layers.0.attention.q_proj.gate"].log_alpha.data.fill_(9.0)  # stays one matrix
    return encoder.eval()


@pytest.mark.parametrize("style", [{}, LARGE_STYLE, {"relative_position": False}], ids=["base", "large", "hubert"])
@pytest.mark.parametrize("units", KINDS, ids="+".join)
def test_outputs_stay(units: list[str], style: dict[str, Any]) -> None:
    gated = gated_encoder(units, **style)
    small = shrink(gated)
    assert_same_outputs(gated, small)
    size = PARAMETERS(small.config, widths_of(small.config))
    assert (
        size == small.num_parameters() == sum(p.numel() for p in small.parameters()) < random_encoder().num_parameters()
    )
    attention, ffn = small.transformer.layers[0].attention, small.transformer.layers[0].ffn
    assert isinstance(attention.q_proj, nn.Linear) and isinstance(ffn.fc1, LowRankLinear) and ffn.fc1.rank == 0
    held = {type(m) for layer in small.transformer.layers for m in layer.modules()}
    assert {nn.Linear, LowRankLinear} <= held


@pytest.mark.parametrize(
    ("cost", "sparsity"), [(PARAMETERS, 0.2), (PARAMETERS, 0.4), (MacCost(1.0), 0.12), (MacCost(1.0), 0.2)], ids=str
)
@pytest.mark.parametrize("units", KINDS, ids="+".join)
def test_the_size_asked_for(units: list[str], cost: Cost, sparsity: float) -> None:
    gated = gated_encoder(units)
    for name, gate in gated.named_gates():
        if name.endswith("output_gate"):
            gate.log_alpha.data.fill_(9.0)  # a whole sublayer is too coarse a unit
    selection = select_units(gated, sparsity, cost)
    small = shrink(gated, sparsity, cost)
    original = cost.original(gated.config)
    smallest_unit = (32 + 8 if "heads" in units else 64) * (1 if cost is PARAMETERS else 49)
    assert cost(small.config, widths_of(small.config)) == pytest.approx((1 - sparsity) * original, abs=smallest_unit)
    apply_selection(gated, selection)
    assert_same_outputs(gated, small, padded=False)


def test_wide_open_it_is_the_teacher_in_function_and_in_size() -> None:
    gated, teacher = gated_encoder(ALL), random_encoder()
    gated.gates.log_alpha.data.fill_(60.0)
    assert_same_outputs(teacher, gated)
    assert PARAMETERS(gated.config, expected_widths(gated)).item() == teacher.num_parameters()
    assert PARAMETERS(gated.config, widths_of(gated.config)) == teacher.num_parameters() < gated.num_parameters()
    small = shrink(gated)
    assert small.config == teacher.config.replace(original_parameters=teacher.num_parameters())
    assert_same_outputs(teacher, small)


def test_sampled_zeros_are_exact_too() -> None:
    """With gates at exactly 0 or 1 the training forward is the cut encoder's; closed components get no gradient."""
    gated = gated_encoder(["heads", "ffn", "rank"])
    for _, gate in gated.named_gates():
        gate.log_alpha.data.copy_(torch.where(gate.log_alpha > 0, 60.0, -60.0))
    small = shrink(gated)
    gated.train()
    assert_same_outputs(gated, small)
    gated(waves()).x.square().sum().backward()
    linear = gated.transformer.layers[0].ffn.fc2
    closed = linear.gate.log_alpha < 0
    assert closed.any() and not linear.up.weight.grad[:, closed].any() and not linear.down.weight.grad[closed].any()
    assert linear.up.weight.grad[:, ~closed].any() and linear.down.weight.grad[~closed].any()


def test_the_constraint_closes_ranks_from_the_start() -> None:
    """At full rank, dropping one component saves nothing, but dropping all of them does."""
    gated = gated_encoder(["rank"])
    gated.gates.log_alpha.data.fill_(4.6)
    constraint = CostConstraint(0.5, 0)
    constraint.lambda1.data.fill_(-1.0)
    assert expected_sparsity(gated) == pytest.approx(0.0, abs=1e-6)
    optimizer = torch.optim.Adam([gated.gates.log_alpha], 0.1)
    for update in range(60):
        optimizer.zero_grad()
        sparsity = constraint.cost.sparsity(gated.config, expected_widths(gated))
        constraint(sparsity, update).backward()
        assert gated.gates.log_alpha.grad.abs().min() > 0
        optimizer.step()
    assert expected_sparsity(gated) > 0.05


def test_cut_by_other_units_afterwards_maps_become_one_matrix() -> None:
    once = shrink(gated_encoder(["rank"], seed=3))
    again = SpeechEncoder(once.config.replace(pruning_units=["heads", "ffn"])).eval()
    again.load_state_dict(once.state_dict(), strict=False)
    for _, gate in again.named_gates():
        gate.log_alpha.data.copy_(torch.linspace(-3, 3, gate.num_units))
    twice = shrink(again)
    assert_same_outputs(again, twice)
    assert twice.num_parameters() == PARAMETERS(twice.config, widths_of(twice.config)) < once.num_parameters()

    def thin(encoder: SpeechEncoder) -> int:
        return sum(isinstance(module, LowRankLinear) for module in encoder.modules())

    assert 0 < thin(twice) < thin(once)
    full = twice.config.full().unit_widths or [32] * 18
    assert [w == f for w, f in zip(twice.config.unit_widths["rank"], full)].count(False) == thin(twice)


def test_what_was_cut_starts_another_stage() -> None:
    once = shrink(gated_encoder(["heads", "ffn", "rank"], seed=1))
    again = SpeechEncoder(once.config.replace(pruning_units=["ffn", "rank"]))
    ranks = [gate for _, gate in again.named_gates() if gate.unit == "rank"]
    assert len(ranks) == sum(isinstance(m, LowRankLinear) and m.rank > 0 for m in once.modules())  # only thin ones
    pruning.gate(once, ["ffn", "rank"])
    once.gates.log_alpha.data.copy_(torch.linspace(-3, 3, len(once.gates.log_alpha)))
    twice = shrink(once)
    assert_same_outputs(once, twice)
    assert twice.num_parameters() == PARAMETERS(twice.config, widths_of(twice.config))


@pytest.mark.parametrize("units", [["rank"], ["heads", "ffn", "rank"]], ids="+".join)
def test_the_smallest_singular_values_go_first(units: list[str]) -> None:
    teacher = random_encoder()
    student = prune_by_magnitude(teacher, 0.4, units)
    assert student.num_parameters() == pytest.approx(0.6 * teacher.num_parameters(), abs=65)
    if units == ["rank"]:
        ranks = student.config.unit_widths["rank"]
        assert max(ranks) - min(ranks) <= 1  # equal shares
        found, before = (e.transformer.layers[1].ffn.fc1.weight for e in (student, teacher))
        u, s, v = torch.linalg.svd(before)
        s[ranks[6 + 4] :] = 0
        torch.testing.assert_close(found, u[:, :32] * s @ v)


def test_a_start_of_a_fixed_rank(small: Any, teacher_file: Path, speech: Path, tmp_path: Path) -> None:
    task = small.make_task(speech, teacher_file)
    cfg = small.student_config(teacher_file, unit_widths={"rank": 5})
    encoder = task.build_model(cfg).eval().speech_encoder
    teacher = load_encoder(teacher_file)
    assert encoder.config.unit_widths == {"rank": [5] * 18}
    assert encoder.config.original_parameters == teacher.num_parameters()
    assert encoder.num_parameters() == teacher.num_parameters() - 3 * (4 * (1024 - 5 * 64) + 2 * (1536 - 5 * 80))
    for layer, theirs in zip(encoder.transformer.layers, teacher.transformer.layers):
        for sublayer, name in LINEARS:
            found, weight = (getattr(getattr(side, sublayer), name).weight for side in (layer, theirs))
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
            torch.testing.assert_close(found, u[:, :5] * s[:5] @ v[:5])
    save_encoder(encoder, tmp_path / "student.safetensors")
    second = small.student_config(tmp_path / "student.safetensors")
    assert_same_outputs(task.build_model(second).eval().speech_encoder, encoder)
    for widths, said in (({"rank": 33}, ["33", "32"]), ({"depth": 3}, ["'depth'", "import"]), (5, ["5", "rank: 96"])):
        with pytest.raises(ValueError, match=says("model.unit_widths", *said)):
            task.build_model(small.student_config(teacher_file, unit_widths=widths))
    again = small.student_config(tmp_path / "student.safetensors", unit_widths={"rank": 4})
    with pytest.raises(ValueError, match=says("model.unit_widths", "{'rank': 4}", "remove the field")):
        task.build_model(again)


def test_a_random_start_has_ranks_too(small: Any, teacher_file: Path, speech: Path) -> None:
    teacher = load_encoder(teacher_file)
    cfg = small.student_config(teacher_file, pruning_units=["rank"], init_layers=[1, None], encoder_layers=2)
    student = make_student(teacher, cfg)
    copied, drawn = (layer.ffn.fc1 for layer in student.transformer.layers)
    torch.testing.assert_close(copied.weight, teacher.transformer.layers[0].ffn.fc1.weight)
    assert drawn.weight.std().item() == pytest.approx(0.02, rel=0.2) and drawn.gate.num_units == 32


def test_a_gated_student_of_fairseq(small: Any, teacher_file: Path, speech: Path) -> None:
    task = small.make_task(speech, teacher_file)
    model = task.build_model(small.student_config(teacher_file, pruning_units=["rank"], rank_drop_rate=0.25)).eval()
    gates = [gate for _, gate in model.speech_encoder.named_gates()]
    assert len(gates) == 18 and all(gate.drop_rate == 0.25 for gate in gates)
    model.speech_encoder.gates.log_alpha.data.fill_(60.0)
    assert_same_outputs(model.speech_encoder, load_encoder(teacher_file))
    with pytest.raises(ValueError, match=says("model.rank_drop_rate", "1.5")):
        task.build_model(small.student_config(teacher_file, pruning_units=["rank"], rank_drop_rate=1.5))


def test_lower_precision() -> None:
    for dtype, tolerance in ((torch.bfloat16, 0.1), (torch.float64, 1e-6)):
        gated = gated_encoder(["heads", "ffn", "rank"]).to(dtype)
        small = shrink(gated)
        assert {p.dtype for p in small.parameters()} == {dtype}
        with torch.no_grad():
            found, wanted = small(waves().to(dtype)).x, gated(waves().to(dtype)).x
        assert (found - wanted).norm() / wanted.norm() < tolerance
        gated.train()(waves().to(dtype)).x.square().mean().backward()
        assert all(torch.isfinite(p.grad).all() for p in gated.parameters())
        assert gated.transformer.layers[0].ffn.fc2.gate.grad.abs().max() > 0


def test_models_of_transformers_say_what_to_do() -> None:
    with pytest.raises(ValueError, match=says("units", "'rank'", "HubertModel", "as_encoder(model)")):
        pruning.gate(huggingface("hubert", "base"), ["heads", "rank"])
    encoder = pruning.as_encoder(huggingface("hubert", "base"))
    pruning.gate(encoder, ["heads", "rank"])
    assert isinstance(encoder.transformer.layers[0].ffn.fc1, LowRankLinear)


def test_tables_cards_and_reports_show_them(tmp_path: Path) -> None:
    small = shrink(gated_encoder(ALL))
    ranks = small.config.unit_widths["rank"]
    head, *lines = kept_tables(small.config)["layer"]
    assert head[-1] == "ranks (q k v out fc1 fc2)"
    first = f"{' '.join(map(str, ranks[:4]))} 0 {ranks[5]}"
    assert lines[0][-1] == first and ranks[0] == 32
    assert lines[1][-1] == "- - - - - -"  # removed attention, FFN of no units
    save_encoder(small, tmp_path / "small.safetensors")
    assert load_encoder(tmp_path / "small.safetensors").config == small.config
    (line,) = (cells for name, cells in as_rows(describe(tmp_path / "small.safetensors")) if name == "rank")
    assert first in line
    assert f"| ranks (q k v out fc1 fc2) | {first}" in model_card(small, {}, "", "s3prl")
    gated = model_card(gated_encoder(["rank"]), {}, "", "s3prl")
    assert f"| parameters | {random_encoder().num_parameters():,} |" in gated
    assert first in units_section(small.config, tmp_path) and (tmp_path / "units.png").stat().st_size > 1000
