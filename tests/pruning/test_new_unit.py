"""A kind of prunable unit that only this file adds: the ranks of the FFN's two linear maps.

``W = A diag(z) B`` with a gate z for every rank; cut, it is two thin matrices (Wang et al. 2020, arXiv:1910.04732).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Iterator

import pytest
import torch
import torch.nn.functional as F
from huggingface_models import huggingface
from messages import says
from torch import Tensor, nn

from skill_fairseq import pruning
from skill_fairseq.checkpoints import load_encoder, save_encoder
from skill_fairseq.models.skill_student import SkillStudentConfig
from skill_fairseq.models.student_init import make_student
from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.gate_bank import Draw, HardConcrete
from skill_fairseq.modules.size import Number, Widths, widths_of
from skill_fairseq.modules.slicing import StandIn, take
from skill_fairseq.modules.units import UNITS, PrunableUnit, Site, State, register_unit, with_units
from skill_fairseq.pruning.costs import PARAMETERS, MacCost
from skill_fairseq.pruning.expected import expected_sparsity, expected_widths
from skill_fairseq.pruning.lagrangian import CostConstraint
from skill_fairseq.pruning.selection import apply_selection, select_units
from skill_fairseq.pruning.shrink import kept_tables, shrink
from tests.conftest import random_encoder, waves

LINEARS = ("fc1", "fc2")
KINDS = ["heads", "ffn", "ffn_layers", "ffn_rank"]


class LowRank(StandIn):
    """``x -> weight diag(z) reduce x + bias``."""

    inputs = ("reduce",)
    gate: HardConcrete | None = None

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        self.reduce = nn.Parameter(linear.weight.new_zeros(rank, linear.in_features))
        self.bias = linear.bias

    def forward(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        units = None if draw is None else draw.of(self.gate)
        if units is None:
            return F.linear(F.linear(x, self.reduce), self.weight, self.bias)
        weight = take(self.weight, 1, units.indices) * units.gate.to(x.dtype)
        return F.linear(F.linear(x, take(self.reduce, 0, units.indices)), weight, self.bias)


class FFNRank(PrunableUnit):
    """Two entries per layer, for the FFN's first and second linear map."""

    name = "ffn_rank"
    drop_rate = "ffn_drop_rate"
    label, rows = "ranks", "FFN matrix"

    def full(self, config: EncoderConfig) -> list[int]:
        return [min(config.encoder_embed_dim, config.encoder_ffn_embed_dim)] * (2 * config.encoder_layers)

    def build(self, encoder: Any) -> None:
        ranks = self.left(encoder.config)
        for i, layer in enumerate(encoder.transformer.layers):
            for j, name in enumerate(LINEARS if layer.ffn is not None and layer.ffn.width else ()):
                setattr(layer.ffn, name, LowRank(getattr(layer.ffn, name), ranks[2 * i + j] or 0))

    def convert(self, config: EncoderConfig, state: State) -> None:
        for i in range(config.encoder_layers):
            for name in (f"transformer.layers.{i}.ffn.{linear}" for linear in LINEARS):
                if f"{name}.weight" in state:
                    u, s, v = torch.linalg.svd(state[f"{name}.weight"], full_matrices=False)
                    state[f"{name}.weight"], state[f"{name}.reduce"] = u * s.sqrt(), s.sqrt()[:, None] * v

    def sites(self, encoder: Any) -> Iterator[Site]:
        for i, layer in enumerate(encoder.transformer.layers):
            for j, name in enumerate(LINEARS if layer.ffn is not None and layer.ffn.width else ()):
                yield Site(2 * i + j, f"transformer.layers.{i}.ffn.{name}", len(getattr(layer.ffn, name).reduce))

    def cut(self, encoder: Any, site: Site, kept: Tensor, factor: Tensor, state: State, shape: dict[str, Any]) -> None:
        state[f"{site.owner}.weight"] = state[f"{site.owner}.weight"][:, kept] * factor
        state[f"{site.owner}.reduce"] = state[f"{site.owner}.reduce"][kept]
        shape["unit_widths"].setdefault(self.name, self.full(encoder.config))[site.place] = len(kept)

    def parameters(self, config: EncoderConfig, widths: Widths) -> Number:
        dim, total = config.encoder_embed_dim, 0
        for i, (units, present) in enumerate(zip(widths["ffn"], widths["ffn_layers"])):
            if isinstance(units, Tensor) or units:
                ranks = widths[self.name][2 * i] + widths[self.name][2 * i + 1]
                total += present * (ranks * (dim + units) - 2 * dim * units)
        return total

    def macs(self, config: EncoderConfig, widths: Widths, frames: int) -> Number:
        return frames * self.parameters(config, widths)


@pytest.fixture(autouse=True)
def registered() -> Any:
    register_unit(FFNRank)
    yield
    del UNITS["ffn_rank"]


@pytest.fixture
def teacher() -> SpeechEncoder:
    return random_encoder()


@pytest.fixture
def gated(teacher: SpeechEncoder) -> SpeechEncoder:
    """The teacher's weights, scattered gates, one closed FFN sublayer, one without units, one matrix of rank 0."""
    encoder = SpeechEncoder(teacher.config.replace(pruning_units=KINDS)).eval()
    state = with_units(encoder.config, teacher.state_dict(), teacher.config)
    missing, unexpected = encoder.load_state_dict(state, strict=False)
    assert not unexpected and missing == ["gates.log_alpha", "gates.kept_override"]
    generator = torch.Generator().manual_seed(2)
    gates = dict(encoder.named_gates())
    for name, gate in gates.items():
        scattered = torch.randn(gate.num_units, generator=generator)
        gate.log_alpha.data.copy_(scattered + (3.0 if name.endswith("output_gate") else 0.0))
    gates["transformer.layers.0.ffn.output_gate"].log_alpha.data.fill_(-9.0)
    gates["transformer.layers.1.ffn.fc2.gate"].log_alpha.data.fill_(-9.0)
    gates["transformer.layers.2.ffn.gate"].log_alpha.data.fill_(-9.0)
    return encoder


def assert_close(one: SpeechEncoder, other: SpeechEncoder) -> None:
    with torch.no_grad():
        states = zip(one(waves()).hidden_states, other(waves()).hidden_states)
        assert max(float((x - y).norm() / x.norm()) for x, y in states) < 1e-5


def test_gates_lie_where_their_modules_do(gated: SpeechEncoder) -> None:
    layer = ["attention.gate", "ffn.gate", "ffn.output_gate", "ffn.fc1.gate", "ffn.fc2.gate"]
    assert [name for name, _ in gated.named_gates()] == [f"transformer.layers.{i}.{x}" for i in range(3) for x in layer]
    assert {gate.unit: gate.num_units for _, gate in gated.named_gates()} == dict(zip(KINDS, (4, 48, 1, 32)))


def test_wide_open_it_is_the_teacher(gated: SpeechEncoder, teacher: SpeechEncoder) -> None:
    gated.gates.log_alpha.data.fill_(60.0)
    assert_close(gated, teacher)
    left = {**widths_of(teacher.config), "ffn_rank": [32] * 6}
    for kind, column in expected_widths(gated).items():
        assert column.tolist() == left[kind]
    more = 3 * (64 * (32 + 48) - 2 * 32 * 48)  # at full rank two matrices are larger than one
    assert PARAMETERS(gated.config, expected_widths(gated)).item() == teacher.num_parameters() + more
    assert gated.num_parameters() == teacher.num_parameters() + more


def test_a_step_of_training_moves_gates_and_both_matrices(gated: SpeechEncoder) -> None:
    gated.gates.log_alpha.data.fill_(0.5)
    gated.train()
    constraint = CostConstraint(0.9, 0, MacCost(1.0))
    constraint.lambda1.data.fill_(-1.0)
    optimizer = torch.optim.SGD(gated.parameters(), 1e-2)
    torch.manual_seed(0)
    draw = gated.draw_gates()
    size = constraint(constraint.cost.sparsity(gated.config, expected_widths(gated)), 0)
    (gated(waves(), draw=draw).x.square().mean() + size).backward()
    fc2 = gated.transformer.layers[1].ffn.fc2
    closed = draw.z[fc2.gate.part] == 0
    assert closed.any() and not closed.all()
    assert not fc2.weight.grad[:, closed].any() and not fc2.reduce.grad[closed].any()
    assert fc2.weight.grad[:, ~closed].abs().sum(0).min() > 0 and fc2.gate.grad.abs().min() > 0
    before = expected_sparsity(gated, cost=constraint.cost)
    optimizer.step()
    assert expected_sparsity(gated, cost=constraint.cost) > before


@pytest.mark.parametrize("sparsity", [None, 0.35])
def test_shrinking_keeps_the_function_and_hits_the_size(gated: SpeechEncoder, sparsity: Any, tmp_path: Path) -> None:
    original = random_encoder().num_parameters()
    selection = select_units(gated, sparsity)
    small = shrink(gated, sparsity)
    apply_selection(gated, selection)
    assert_close(gated, small)
    ffn = small.transformer.layers[1].ffn
    assert isinstance(ffn.fc1, LowRank) and ffn.fc1.reduce.shape == (small.config.unit_widths["ffn_rank"][2], 32)
    counted = PARAMETERS(small.config, widths_of(small.config))
    assert counted == small.num_parameters() == sum(p.numel() for p in small.parameters())
    if sparsity is None:
        assert small.config.ffn_dims[0] is None and small.config.ffn_dims[2] == 0
        assert small.config.unit_widths["ffn_rank"][3] == 0 and len(ffn.fc2.reduce) == 0
        assert kept_tables(small.config)["FFN matrix"][3:5] == [
            ["3", f"{len(ffn.fc1.reduce)} / 32"],
            ["4", "bias only"],
        ]
    else:
        assert counted == pytest.approx((1 - sparsity) * original, abs=64)
    save_encoder(small, tmp_path / "small.safetensors")
    again = load_encoder(tmp_path / "small.safetensors")
    assert again.config == small.config
    assert_close(again, small)
    with pytest.raises(ValueError, match=says("gates")):
        shrink(again)


def test_what_was_cut_can_be_gated_and_cut_again(gated: SpeechEncoder) -> None:
    gated.gates.log_alpha.data.add_(1.0)
    once = shrink(gated)
    again = SpeechEncoder(once.config.replace(pruning_units=["ffn"])).eval()
    again.load_state_dict(once.state_dict(), strict=False)
    for _, gate in again.named_gates():
        gate.log_alpha.data.copy_(torch.linspace(-3, 3, gate.num_units))
    twice = shrink(again)
    assert twice.num_parameters() < once.num_parameters()
    assert twice.config.unit_widths == once.config.unit_widths
    assert_close(again, twice)


def test_what_was_cut_starts_another_stage_of_its_own_kind(gated: SpeechEncoder) -> None:
    gated.gates.log_alpha.data.add_(1.0)
    once = shrink(gated)
    cfg = SkillStudentConfig(pruning_units=["ffn_rank"], seed=1)
    again = make_student(once, cfg)  # it already has the matrices, which must not be factorised again
    again.gates.log_alpha.data.fill_(60.0)
    assert {gate.unit for _, gate in again.named_gates()} == {"ffn_rank"}
    assert_close(again, once)


def test_the_library_for_any_loop_has_it(teacher: SpeechEncoder) -> None:
    expected = random_encoder()
    pruning.gate(teacher, KINDS)
    teacher.gates.log_alpha.data.fill_(60.0)
    assert_close(teacher, expected)
    assert isinstance(teacher.transformer.layers[0].ffn.fc1, LowRank)
    teacher.gates.log_alpha.data.copy_(torch.linspace(-2, 4, teacher.gates.log_alpha.numel()))
    once = shrink(teacher)
    assert_close(teacher, once)
    again = pruning.gate(once, ["ffn_rank"])  # its modules are there already
    once.gates.log_alpha.data.fill_(60.0)
    assert again.expected_cost().item() == PARAMETERS(once.config, widths_of(once.config))
    assert_close(teacher, once)
    with pytest.raises(ValueError, match=says("units", "ffn_rank", "HubertModel", "as_encoder(model)")):
        pruning.gate(huggingface("hubert", "base"), KINDS)


def test_a_student_of_fairseq_has_it(speech: Path, teacher_file: Path, small: Any, tmp_path: Path) -> None:
    task = small.make_task(speech, teacher_file)
    cfg = small.student_config(teacher_file, pruning_units=KINDS, ffn_drop_rate=0.25)
    model = task.build_model(cfg).eval()
    gates = [gate for _, gate in model.speech_encoder.named_gates() if gate.unit == "ffn_rank"]
    assert len(gates) == 6 and all(gate.drop_rate == 0.25 for gate in gates)
    model.speech_encoder.gates.log_alpha.data.fill_(60.0)
    assert_close(model.speech_encoder, load_encoder(teacher_file))
    log_alpha = model.speech_encoder.gates.log_alpha
    log_alpha.data.copy_(torch.linspace(-2, 4, log_alpha.numel()))
    shrunk = shrink(model.speech_encoder)
    save_encoder(shrunk, tmp_path / "small.safetensors")
    second = task.build_model(small.student_config(tmp_path / "small.safetensors")).eval()
    assert second.cfg.unit_widths == shrunk.config.unit_widths  # its checkpoint holds the whole shape
    assert_close(second.speech_encoder, shrunk)


def test_names_and_widths_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=says("model.unit_widths", "[33", "ffn_rank")):
        EncoderConfig(**{**vars(random_encoder().config), "unit_widths": {"ffn_rank": [33] * 6}})
    config = random_encoder().config.replace(unit_widths={"ffn_rank": [8] * 6})
    assert EncoderConfig.from_dict(config.to_dict()) == config and not config.is_full() and config.full().is_full()
    del UNITS["ffn_rank"]
    with pytest.raises(ValueError, match=says("model.unit_widths", "'ffn_rank'", "import")):
        EncoderConfig.from_dict(config.to_dict())
    register_unit(FFNRank)
