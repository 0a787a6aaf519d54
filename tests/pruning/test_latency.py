"""Measured time as a cost: interpolation, a synthetic table with known times, and a measured one."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from messages import says
from runs import train

from skill_fairseq.benchmarking.latency_table import mixed_student, uniform_student, width_of
from skill_fairseq.checkpoints import load_encoder, save_encoder
from skill_fairseq.checkpoints.load import read_source
from skill_fairseq.cli.bench import main
from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.size import widths_of
from skill_fairseq.pruning import ExactConstraint, MacCost, gate, shrink
from skill_fairseq.pruning.costs import make_cost
from skill_fairseq.pruning.expected import expected_sparsity, expected_widths
from skill_fairseq.pruning.latency import PARTS, LatencyCost, conv_share, fit, interpolate, read_table
from skill_fairseq.pruning.targets import read_targets, saved_targets
from tests.conftest import random_encoder


def truth(student: EncoderConfig) -> float:
    """5 ms, up to 8 ms for the conv stack by MACs, 0.5 ms per head, and FFN units that cost more the more there are."""
    heads = sum(len(kept) for kept in student.heads)
    conv = 8 * conv_share(student, student.conv_channels)
    return 5 + conv + 0.5 * heads + sum(0.001 * units**2 for units in student.ffn_dims)


def knots_of(config: EncoderConfig) -> tuple[dict[str, list[float]], list[EncoderConfig]]:
    """Widths of each part at 0, a half and all of its units, and the students that have them."""
    knots, students = {}, []
    for part in PARTS:
        own = [uniform_student(config, **{part: share}) for share in (0.0, 0.5, 1.0)]
        knots[part] = [width_of(student, part) for student in own]
        students += own
    return knots, students


def made_up(config: EncoderConfig) -> dict[str, Any]:
    knots, students = knots_of(config)
    return fit(config, knots, students, [truth(student) for student in students])


def test_lines_from_knot_to_knot_with_their_slopes() -> None:
    knots, values = [0.0, 1.0, 4.0], [2.0, 3.0, 9.0]
    x = torch.tensor([-1.0, 0.5, 1.0, 2.5, 4.0, 6.0], requires_grad=True)
    y = interpolate(x, knots, values)
    assert y.tolist() == pytest.approx([2, 2.5, 3, 6, 9, 9])
    assert y.tolist() == pytest.approx([interpolate(v, knots, values) for v in x.tolist()])
    y[[1, 3]].sum().backward()
    assert x.grad.tolist() == [0, 1, 0, 2, 0, 0]


def test_the_conv_stacks_share_is_that_of_its_macs() -> None:
    config = random_encoder().config
    cost = MacCost(60.0)  # long enough that frames lost at the ends do not matter
    no_conv = {**widths_of(config.full()), "conv": [1] * len(config.conv_feature_layers)}
    channels = [max(1, width // 2) for width in config.conv_channels]
    share = conv_share(config, channels)
    found = [cost(config, {**no_conv, "conv": width}) for width in (channels, config.conv_channels)]
    projection = [
        config.num_frames(960000) * config.encoder_embed_dim * width[-1] for width in (channels, config.conv_channels)
    ]
    rest = cost(config, {**no_conv, "conv": [0] * len(channels)})
    assert share == pytest.approx((found[0] - projection[0] - rest) / (found[1] - projection[1] - rest), rel=1e-2)


def test_a_fit_holds_for_students_it_has_not_seen() -> None:
    config = random_encoder().config
    knots, _ = knots_of(config)
    known = {
        "rest_ms": 5.0,
        "shape": made_up(config)["shape"],
        **{part: {"widths": knots[part], "ms": [0.0, 2.0 + i, 7.0]} for i, part in enumerate(PARTS)},
    }
    cost, draw = LatencyCost(known), random.Random(0)
    students = [mixed_student(config, draw) for _ in range(40)]
    times = [cost(student, widths_of(student)) for student in students]
    found = fit(config, knots, students[:30], times[:30])
    assert found["rest_ms"] == pytest.approx(5.0, rel=1e-6)
    for part in PARTS:
        assert found[part]["ms"] == pytest.approx(known[part]["ms"], rel=1e-6)
    noise = [time * draw.uniform(0.98, 1.02) for time in times]
    about = LatencyCost(fit(config, knots, students[:30], noise[:30]))
    for student, time in zip(students[30:], times[30:]):
        assert about(student, widths_of(student)) == pytest.approx(time, rel=0.02)


def test_noise_makes_no_wider_part_faster() -> None:
    config = random_encoder().config
    knots, students = knots_of(config)
    times = [truth(student) for student in students]
    times[4] += 5.0
    table = fit(config, knots, students, times)
    read_table(json.dumps(table))  # refuses times that fall
    assert table["heads"]["ms"][1] > 0.5 * table["heads"]["widths"][1]


def test_gates_and_student_meet_milliseconds() -> None:
    encoder = random_encoder()
    table = made_up(encoder.config)
    (target,) = read_targets({"latency_ms": 12.0, "table": table}, "f")
    cost = target.cost
    assert isinstance(cost, LatencyCost) and make_cost(**cost.settings()) == cost
    full = cost(encoder.config, widths_of(encoder.config))
    assert full == pytest.approx(cost.unpruned()) and full > 14
    gates = gate(encoder)
    encoder.gates.log_alpha.data.normal_(0.0, 1.0, generator=torch.Generator().manual_seed(0))
    ExactConstraint([target], 0).impose(gates, 0)
    assert float(cost(encoder.config, expected_widths(encoder)).detach()) == pytest.approx(12.0, abs=1e-4)
    small = shrink(encoder.eval(), [target])
    assert cost(small.config, widths_of(small.config)) == pytest.approx(12.0, abs=0.1)
    assert expected_sparsity(encoder) != pytest.approx(target.sparsity, abs=1e-2)  # parameters are something else
    assert saved_targets({"target": {"latency_ms": 12.0, "table": table}}) == (target,)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"latency_ms": 500.0}, ["f.latency_ms: 500.0", "before pruning"]),
        ({"latency_ms": "fast"}, ["f.latency_ms: 'fast'"]),
        ({"table": None}, ["f", "skill-bench table"]),
        ({"table": {"rest_ms": 1.0}}, ["f", "shape", "skill-bench table"]),
        ({"heads": {"widths": [0, 0], "ms": [1, 2]}}, ["f", "heads", "ascend"]),
        ({"ffn": {"widths": [0, 1], "ms": [1]}}, ["f", "ffn", "equal length"]),
    ],
)
def test_what_is_refused(change: dict, said: list) -> None:
    table = made_up(random_encoder().config)
    asked = {"latency_ms": 12.0, "table": {**table, **{k: v for k, v in change.items() if k in PARTS}}}
    asked.update({k: v for k, v in change.items() if k not in PARTS})
    with pytest.raises(ValueError, match=says(*said)):
        read_targets({k: v for k, v in asked.items() if v is not None}, "f")


def test_a_table_of_another_shape_is_refused() -> None:
    cost = LatencyCost(made_up(random_encoder().config))
    other = random_encoder(encoder_ffn_embed_dim=96).config
    with pytest.raises(ValueError, match=says("encoder_ffn_embed_dim", 96, "skill-bench table")):
        cost(other, widths_of(other))


@pytest.mark.slow
def test_a_table_is_measured_and_a_run_held_to_it(speech: Path, tmp_path: Path, capsys: Any) -> None:
    """The numbers are times, and one command's file is the other's target; their accuracy is not tested."""
    teacher, file = tmp_path / "teacher.safetensors", tmp_path / "latency.json"
    save_encoder(random_encoder(), teacher)
    words = ["table", "--model", str(teacher), "--seconds", "1", "--points", "2", "--checks", "2", "--mixed", "2"]
    assert main([*words, "--repeats", "2", "--threads", "1", "--json"]) == 0
    printed = capsys.readouterr()
    file.write_text(printed.out)
    found = json.loads(printed.out)
    assert found["runtime"] == "torch" and len(found["check"]) == 2 and "by the table" in printed.err
    read_table(file.read_text())
    before, least = LatencyCost(found).unpruned(), found["rest_ms"]
    assert 0 < least <= before  # on a busy machine such a small student may be as slow as the full encoder
    found["ffn"]["ms"] = [10.0 * width / found["ffn"]["widths"][-1] for width in found["ffn"]["widths"]]
    file.write_text(json.dumps(found))
    before = LatencyCost(found).unpruned()
    asked = least + 0.7 * (before - least)
    common = [f"task.data={speech}", f"task.teacher={teacher}", "criterion.groups=[[0],[3]]"]
    common += ["criterion.target_sparsity=null", "criterion.sparsity_warmup=1", "criterion.constraint=exact"]
    common += [f"+criterion.target={{latency_ms: {asked}, table: latency.json}}", "dataset.max_tokens=60000"]
    train(tmp_path, "distill", *common, "optimization.max_update=2")
    file.unlink()  # the checkpoint has it
    (target,) = saved_targets(read_source(tmp_path / "checkpoint_last.pt").provenance)
    gated = load_encoder(tmp_path / "checkpoint_last.pt")
    assert expected_sparsity(gated, cost=target.cost) == pytest.approx(1 - asked / before, abs=1e-5)
