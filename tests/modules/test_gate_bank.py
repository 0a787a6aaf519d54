"""The bank: what its vectors of gates share, and equality to separate vectors."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from messages import says
from torch import nn

from skill_fairseq.modules import gate_bank
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.gate_bank import GateBank, HardConcrete
from skill_fairseq.modules.hard_concrete import EPS, deterministic_gate, hard_concrete_sample, keep_probability
from skill_fairseq.pruning.expected import expected_parameters, expected_widths
from tests.conftest import random_encoder

UNITS = ["conv", "heads", "ffn", "attention_layers", "ffn_layers"]
SIZES = [512, 12, 3, 1, 100]


def bank_of(*vectors: Any) -> GateBank:
    bank = GateBank()
    for values in vectors:
        bank.add(len(values)).log_alpha.data.copy_(torch.as_tensor(values))
    return bank


def scattered(sizes: list[int] = SIZES, seed: int = 0) -> GateBank:
    generator = torch.Generator().manual_seed(seed)
    return bank_of(*(torch.randn(size, generator=generator) for size in sizes))


def seeded(bank: GateBank, seed: int) -> GateBank:
    bank.generator = torch.Generator().manual_seed(seed)
    return bank


def test_one_draw_gives_each_vector_what_it_would_draw_by_itself_in_turn() -> None:
    bank = seeded(scattered(), 7)
    draw = bank.draw()
    noise = torch.Generator().manual_seed(7)
    for gate in bank.gates:
        u = EPS + (1 - 2 * EPS) * torch.rand(gate.num_units, generator=noise)
        alone = hard_concrete_sample(gate.log_alpha, u)
        torch.testing.assert_close(draw.z[gate.part], alone, rtol=1e-6, atol=1e-7)  # the same noise, but for rounding
    seeded(bank, 7)
    torch.testing.assert_close(torch.cat([gate() for gate in bank.gates]), draw.z, rtol=1e-6, atol=1e-7)


def test_units_of_a_draw() -> None:
    bank = GateBank()
    wide, few, none, all_open = bank.add(100), bank.add(50, multiple=8), bank.add(1), bank.add(4)
    with torch.no_grad():
        for gate, value in ((wide, -30.0), (few, -30.0), (none, -30.0), (all_open, 30.0)):
            gate.log_alpha.fill_(value)
        wide.log_alpha[[3, 50]] = 30.0
        few.log_alpha[49] = 30.0
    draw = bank.draw()
    assert draw.of(None) is None
    units = {gate: draw.of(gate) for gate in bank.gates}
    assert units[wide].indices.tolist() == [3, 50] and units[wide].gate.tolist() == [1.0, 1.0]
    assert units[few].indices.tolist() == [0, 1, 2, 3, 4, 5, 6, 49]
    assert units[few].gate.tolist() == [0.0] * 7 + [1.0]
    assert units[none].indices is None and not units[none].any_open
    assert units[all_open].indices is None and units[all_open].gate.tolist() == [1.0] * 4
    whole = bank.draw(slicing=False)
    assert all(entry.indices is None for entry in whole.units) and whole.of(wide).gate.numel() == 100


def test_evaluation_keeps_what_each_vector_keeps() -> None:
    bank = scattered().eval()
    bank.gates[1].set_kept(torch.arange(12) % 3 == 0)
    z = bank.draw().z
    for gate in bank.gates:
        torch.testing.assert_close(z[gate.part], deterministic_gate(gate.log_alpha, gate.kept()), rtol=1e-6, atol=0)
        assert torch.equal(z[gate.part] > 0, gate.kept())
    assert (z[bank.gates[1].part] > 0).tolist() == [True, False, False] * 4


def test_the_host_waits_once_whatever_the_number_of_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[str] = []
    monkeypatch.setattr(gate_bank, "to_host", lambda tensor, wait: (waits.append(wait), tensor)[1])
    encoder = random_encoder(pruning_units=UNITS).train()
    assert len(list(encoder.named_gates())) == 19
    encoder(torch.zeros(1, 400))
    assert waits == ["open gates"]
    waits.clear()
    draw = encoder.draw_gates()
    encoder(torch.zeros(1, 400), draw=draw)
    assert waits == ["open gates"]  # by the draw, not by the forward


@pytest.mark.parametrize("drop_rate", [0.01, 0.5])
def test_start(drop_rate: float) -> None:
    torch.manual_seed(0)
    log_alpha = GateBank().add(10_000, drop_rate, init_std=0.01).log_alpha.detach()
    mean = math.log((1 - drop_rate) / drop_rate)
    assert abs(log_alpha.mean().item() - mean) < 4 * 0.01 / 100
    assert log_alpha.std().item() == pytest.approx(0.01, rel=0.05)


def test_float32_and_optimizer_group_survive_conversion_and_copying() -> None:
    model = nn.Sequential(nn.Linear(3, 5), bank_of([4.595, 1 / 3, -1.2345678], [0.1, 0.0]))
    before = model[1].log_alpha.detach().clone()
    for convert in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, copy.deepcopy):
        model = convert(model)
        bank = model[1]
        assert bank.log_alpha.dtype == bank.draw().z.dtype == torch.float32
        assert torch.equal(bank.log_alpha, before), "rounded on the way"
        assert bank.log_alpha.param_group == "gates"
        assert torch.equal(bank.gates[1].log_alpha, before[3:])
    assert model[0].weight.dtype == torch.float64
    moved = model.to(device="meta", dtype=torch.float16)[1]
    assert (moved.log_alpha.device.type, moved.log_alpha.dtype) == ("meta", torch.float32)
    assert moved.log_alpha.param_group == "gates"


def test_a_copy_of_an_encoder_has_gates_of_its_own() -> None:
    encoder = seeded_encoder()
    twin = copy.deepcopy(encoder)
    assert twin.gates is not None and twin.gates.generator is None
    for (name, gate), (other, copied) in zip(encoder.named_gates(), twin.named_gates()):
        assert name == other and copied.bank is twin.gates and copied is not gate
    with torch.no_grad():
        twin.gates.log_alpha.fill_(-3.0)
    assert encoder.gates is not None and (encoder.gates.log_alpha > 0).all()
    assert all((gate.log_alpha == -3.0).all() for _, gate in twin.named_gates())


def seeded_encoder(**changes: Any) -> SpeechEncoder:
    encoder = random_encoder(pruning_units=UNITS, **changes)
    assert encoder.gates is not None
    seeded(encoder.gates, 3)
    return encoder


def test_noise_in_a_half_model_stays_inside_the_open_interval() -> None:
    # In float16 1 - 1e-6 is 1, with an infinite logit: every such gate would be open for any log_alpha.
    assert not bank_of(torch.full((200_000,), -20.0)).half().draw().z.any()


def test_override_of_the_kept_units() -> None:
    bank = bank_of([3.0, -3.0, 2.0, 1.0], [1.0, 1.0]).eval()
    gate = bank.gates[0]
    assert gate.kept().tolist() == [True, False, True, True]
    gate.set_kept(torch.tensor([True, True, False, False]))
    assert gate.kept().tolist() == [True, True, False, False]
    expected = [1 / (1 + math.exp(-0.8 * 1.5 * a)) for a in (3.0, -3.0)] + [0.0, 0.0]
    assert gate().tolist() == pytest.approx(expected, rel=1e-6)
    assert bank.draw().z[:4].tolist() == pytest.approx(expected, rel=1e-6)
    gate.set_kept(torch.zeros(4, dtype=torch.bool))
    assert gate().tolist() == [0.0] * 4
    assert bank.gates[1].kept().all()
    gate.set_kept(None)
    assert gate.kept().tolist() == [True, False, True, True]
    with pytest.raises(ValueError, match=says("torch.int64", "torch.bool", "(4,)")):
        gate.set_kept(torch.tensor([1, 1, 0, 0]))


@pytest.mark.parametrize("mask", [None, torch.tensor([False, True, False])])
def test_state_loads_strictly_and_takes_effect_at_once(mask: torch.Tensor | None) -> None:
    source, target = bank_of([0.5, -4.0, 3.0]).eval(), bank_of([3.0, 3.0, 3.0]).eval()
    source.gates[0].set_kept(mask)
    target.gates[0].set_kept(torch.tensor([True, False, False]))
    assert not torch.equal(target.draw().z, source.draw().z)
    target.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(target.draw().z, source.draw().z)
    assert torch.equal(target.gates[0].kept(), source.gates[0].kept())


def test_generators_of_one_seed_give_the_same_gates() -> None:
    banks = [seeded(bank_of(torch.zeros(50)), seed) for seed in (1, 1, 2)]
    first, same, other = (bank.draw().z for bank in banks)
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert not torch.equal(banks[0].draw().z, first), "a fresh sample every time"


def test_expected_widths_and_size_are_those_of_gates_one_by_one() -> None:
    encoder = seeded_encoder(heads=[[0, 2], None, []])
    assert encoder.gates is not None
    with torch.no_grad():
        encoder.gates.log_alpha.normal_(0.5, 2.0, generator=torch.Generator().manual_seed(1))
    widths = expected_widths(encoder, shift=-0.25)
    found = dict(encoder.named_gates())

    def expected(name: str, fixed: float) -> float:
        gate = found.get(name)
        return fixed if gate is None else keep_probability(gate.log_alpha.detach().double() - 0.25).sum().item()

    conv = [expected(f"feature_extractor.layers.{i}.gate", -1) for i in range(7)]
    heads = [expected(f"transformer.layers.{i}.attention.gate", 0) for i in range(3)]
    present = [expected(f"transformer.layers.{i}.attention.output_gate", 0) for i in range(3)]
    ffn = [expected(f"transformer.layers.{i}.ffn.gate", -1) for i in range(3)]
    assert widths["conv"].tolist() == pytest.approx(conv, rel=1e-6)  # type: ignore[union-attr]
    assert widths["heads"].tolist() == pytest.approx(heads, rel=1e-6)  # type: ignore[union-attr]
    assert widths["ffn"].tolist() == pytest.approx(ffn, rel=1e-6)  # type: ignore[union-attr]
    assert widths["attention_layers"].tolist() == pytest.approx(present, rel=1e-6)  # type: ignore[union-attr]
    assert heads[1:] == [0, 0]
    # With all gates wide open, the expected encoder equals the actual one.
    with torch.no_grad():
        encoder.gates.log_alpha.fill_(40.0)
    assert expected_parameters(encoder).item() == encoder.num_parameters()


def test_gradient_of_the_expected_size_against_finite_differences() -> None:
    encoder = seeded_encoder()
    bank = encoder.gates
    assert bank is not None
    bank.log_alpha.data.normal_(0.5, 1.0, generator=torch.Generator().manual_seed(1))
    expected_parameters(encoder).backward()
    assert bank.log_alpha.grad is not None
    for index in (0, 50, bank.log_alpha.numel() - 1):
        with torch.no_grad():
            sizes = []
            for step in (1.0, -1.0):
                bank.log_alpha[index] += step / 8
                sizes.append(expected_parameters(encoder).item())
                bank.log_alpha[index] -= step / 8
        slope = (sizes[0] - sizes[1]) / 0.25
        assert slope == pytest.approx(bank.log_alpha.grad[index].item(), rel=0.02), index


def test_reads_encoders_whose_gates_were_parameters_of_their_own() -> None:
    encoder = seeded_encoder()
    with torch.no_grad():
        encoder.gates.log_alpha.normal_()  # type: ignore[union-attr]
    state = encoder.state_dict()
    flat = {name: state.pop(f"gates.{name}") for name in ("log_alpha", "kept_override")}
    for path, gate in encoder.named_gates():
        state.update({f"{path}.{name}": values[gate.part].clone() for name, values in flat.items()})
    twin = random_encoder(seed=1, pruning_units=UNITS)
    twin.load_state_dict(state, strict=True)
    assert torch.equal(twin.gates.log_alpha, flat["log_alpha"])  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "arguments, field, value",
    [
        ((0,), "num_units", 0),
        ((4, 0.0), "drop_rate", 0.0),
        ((4, 1.0), "drop_rate", 1.0),
        ((4, 0.1, -1.0), "init_std", -1.0),
    ],
)
def test_bad_arguments(arguments: tuple, field: str, value: float) -> None:
    with pytest.raises(ValueError, match=says(field, value)):
        GateBank().add(*arguments)


def test_a_vector_shows_its_size() -> None:
    gate: HardConcrete = GateBank().add(4, 0.25)
    assert repr(gate) == "HardConcrete(num_units=4, drop_rate=0.25)"
