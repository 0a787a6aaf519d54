"""Targets of several costs: parsing, the binding one, and students that meet all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from messages import says
from runs import logged, train

from skill_fairseq.checkpoints import load_encoder
from skill_fairseq.checkpoints.load import read_source
from skill_fairseq.cli.shrink import main
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.size import widths_of
from skill_fairseq.pruning import CostConstraint, ExactConstraint, MacCost, ParameterCost, Target, gate, shrink
from skill_fairseq.pruning.expected import expected_sparsity
from skill_fairseq.pruning.reach import far_from_gates, log_sparsity
from skill_fairseq.pruning.targets import least_excess, read_targets, saved_targets
from skill_fairseq.reporting.training_section import targets

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny" / "teacher" / "teacher.safetensors"
MACS, PARAMETERS = MacCost(10.0), ParameterCost()


@pytest.fixture(scope="module")
def learned() -> SpeechEncoder:
    """Gates for which conv channels, which cost MACs, stay longer than the rest, which has the parameters."""
    encoder = load_encoder(TINY)
    gates = gate(encoder)
    torch.manual_seed(0)
    for _, vector in encoder.named_gates():
        vector.log_alpha.data.normal_(1.0 if vector.unit == "conv" else 0.0, 2.0)
    return gates.encoder.eval()


def left(encoder: SpeechEncoder, cost: Any) -> float:
    return 1 - float(cost.sparsity(encoder.config, widths_of(encoder.config)))


def test_what_a_config_asks_for() -> None:
    assert read_targets({"macs": 0.25}, "f") == (Target(MACS, 0.75),)
    asked = {"macs": 0.25, "seconds": 4, "parameters": 0.3}
    assert read_targets(asked, "f") == (Target(MacCost(4), 0.75), Target(PARAMETERS, 0.7))
    assert saved_targets({"target": asked, "target_sparsity": None}) == read_targets(asked, "f")
    assert saved_targets({"target_sparsity": 0.5, "cost": "macs"}) == (Target(MACS, 0.5),)
    assert saved_targets({"groups": [[0]]}) == ()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, ["f: {}", "parameters, macs"]),
        (0.25, ["f: 0.25", "{macs: 0.25}"]),
        ({"flops": 0.25}, ["flops", "parameters, macs"]),
        ({"macs": 25}, ["f.macs: 25", "0.25 is a quarter"]),
        ({"macs": 0}, ["f.macs: 0"]),
        ({"macs": True}, ["f.macs: True"]),
        ({"macs": 0.25, "second": 3}, ["f.second: 3", "seconds"]),
        ({"parameters": 0.25, "seconds": 3}, ["f.seconds: 3", "is not known"]),
        ({"macs": 0.25, "seconds": -3}, ["f: cost_seconds: -3"]),
    ],
)
def test_what_a_config_cannot_ask_for(asked: Any, said: list) -> None:
    with pytest.raises(ValueError, match=says(*said)):
        read_targets(asked, "f")


def test_the_target_that_is_farthest_off_binds() -> None:
    first, second = (torch.tensor(value, requires_grad=True) for value in (0.5, 0.7))
    excess = least_excess([first, second], [0.4, 0.75])
    excess.backward()
    assert excess.item() == pytest.approx(-0.05) and (first.grad, second.grad) == (0, 1)
    constraint = CostConstraint([Target(MACS, 0.4), Target(PARAMETERS, 0.75)], 0)
    constraint.lambda1.data.fill_(2.0)
    constraint.lambda2.data.fill_(3.0)
    assert constraint([first, second], 0).item() == pytest.approx(2 * -0.05 + 3 * 0.05**2)


@pytest.mark.parametrize(("macs", "parameters", "binds"), [(0.75, 0.5, MACS), (0.3, 0.75, PARAMETERS)])
def test_gates_and_student_meet_every_target(
    learned: SpeechEncoder, macs: float, parameters: float, binds: Any
) -> None:
    both = [Target(MACS, macs), Target(PARAMETERS, parameters)]
    ExactConstraint(both, 0).impose(learned, 0)
    found = {each.cost: expected_sparsity(learned, cost=each.cost) - each.sparsity for each in both}
    assert found.pop(binds) == pytest.approx(0, abs=2e-6) and min(found.values()) > 0.01
    assert far_from_gates(learned, both, "f") is None
    for asked in (both, both[::-1]):
        small = shrink(learned, asked)
        over = {each.cost: left(small, each.cost) / (1 - each.sparsity) for each in both}
        assert all(share <= 1 for share in over.values()) and over[binds] > 0.999


def test_both_may_bind(learned: SpeechEncoder) -> None:
    """Targets that the gates meet together: neither is exceeded."""
    ExactConstraint(0.7, 0).impose(learned, 0)
    both = [Target(each, expected_sparsity(learned, cost=each)) for each in (MACS, PARAMETERS)]
    small = shrink(learned, both)
    over = [left(small, each.cost) / (1 - each.sparsity) for each in both]
    assert max(over) <= 1 and max(over) > 0.999


def test_a_lagrangian_run_is_told_about_the_one_that_binds(learned: SpeechEncoder, caplog: Any) -> None:
    ExactConstraint(0.7, 0).impose(learned, 0)
    there = {each: expected_sparsity(learned, cost=each) for each in (MACS, PARAMETERS)}
    with caplog.at_level("INFO"):
        log_sparsity(learned, [Target(MACS, there[MACS] + 0.04), Target(PARAMETERS, 0.6)])
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "short of" in warning and f"{there[MACS]:.4f}" in warning
    assert caplog.text.count("expected by the gates") == 2


@pytest.mark.slow
@pytest.mark.parametrize("constraint", ["exact", "lagrangian"])
def test_a_run_with_two_targets(speech: Path, teacher_file: Path, tmp_path: Path, constraint: str, capsys: Any) -> None:
    common = [f"task.data={speech}", f"task.teacher={teacher_file}", "criterion.groups=[[0],[3]]"]
    common += ["criterion.target_sparsity=null", "criterion.sparsity_warmup=2", f"criterion.constraint={constraint}"]
    common += ["+criterion.target={parameters: 0.6, macs: 0.5, seconds: 2}", "dataset.max_tokens=60000"]
    common += ["common.log_interval=1", "common.log_format=json", "optimization.max_update=4"]
    log = train(tmp_path, "distill", *common)
    last = logged(log, "train_inner")[-1]
    assert targets([last]) == {"_parameters": " of parameters", "_macs": " of macs"}
    assert (last["target_sparsity_parameters"], last["target_sparsity_macs"]) == (0.4, 0.5)
    checkpoint = tmp_path / "checkpoint_last.pt"
    if constraint == "exact":
        excess = [last[f"expected_sparsity_{name}"] - goal for name, goal in (("parameters", 0.4), ("macs", 0.5))]
        assert min(excess) == pytest.approx(0, abs=1e-4)
    assert main([str(checkpoint), str(tmp_path / "small.safetensors")]) == 0
    assert "MACs for 2 s" in capsys.readouterr().out
    small, source = load_encoder(tmp_path / "small.safetensors"), read_source(tmp_path / "small.safetensors")
    limits = {"parameters": (ParameterCost(), 0.6), "macs": (MacCost(2.0), 0.5)}
    found = {name: left(small, cost) / most for name, (cost, most) in limits.items()}
    assert 0.98 < max(found.values()) <= 1
    assert source.provenance["sparsity"]["asked"] == {"parameters": 0.4, "macs": 0.5}
