"""skill-shrink on encoders with scattered gates."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from messages import says
from runs import train

from skill_fairseq.checkpoints import load_encoder, save_encoder
from skill_fairseq.checkpoints.load import read_source
from skill_fairseq.cli.shrink import main
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.pruning.costs import MacCost
from skill_fairseq.pruning.expected import expected_parameters
from skill_fairseq.pruning.shrink import shrink

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tiny"
UNITS = ("conv", "heads", "ffn", "attention_layers", "ffn_layers")
GROUPS = [[0], [1, 2, 3]]


@pytest.fixture
def gated(small: Any) -> SpeechEncoder:
    """Gates around their threshold; layer 1 loses its attention, layer 2 all heads, layer 3 all FFN units."""
    encoder = small.random_encoder(pruning_units=list(UNITS))
    generator = torch.Generator().manual_seed(5)
    for name, gate in encoder.named_gates():
        gate.log_alpha.data.copy_(torch.randn(gate.num_units, generator=generator) * 2)
        if name.endswith("output_gate"):
            gate.log_alpha.data.fill_(-9.0 if name.endswith("0.attention.output_gate") else 3.0)
    gates = dict(encoder.named_gates())
    gates["transformer.layers.1.attention.gate"].log_alpha.data.fill_(-9.0)
    gates["transformer.layers.2.ffn.gate"].log_alpha.data.fill_(-9.0)
    return encoder


@pytest.fixture
def stage1(gated: SpeechEncoder, tmp_path: Path) -> Path:
    path = tmp_path / "stage1.safetensors"
    save_encoder(gated, path, {"target_sparsity": 0.6, "groups": GROUPS})
    return path


def test_shrinks_to_the_target_in_the_file(stage1: Path, gated: SpeechEncoder, capsys: Any) -> None:
    out = stage1.with_name("small.safetensors")
    assert main([str(stage1), str(out)]) == 0
    encoder, full = load_encoder(out), gated.num_parameters()
    assert abs(1 - encoder.num_parameters() / full - 0.6) < 32 / full
    expected = shrink(gated, 0.6)
    assert encoder.config == expected.config
    for name, tensor in expected.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], tensor), name
    said = read_source(out).provenance
    assert said["source"] == "stage1.safetensors" and said["groups"] == GROUPS
    assert said["sparsity"]["asked"] == 0.6
    assert said["sparsity"]["actual"] == pytest.approx(1 - encoder.num_parameters() / full)
    assert said["sparsity"]["expected"] == pytest.approx(1 - expected_parameters(gated).item() / full)
    assert "wrote " in capsys.readouterr().out


def test_table_shows_every_layer(stage1: Path, gated: SpeechEncoder, capsys: Any) -> None:
    assert main([str(stage1), "--table-only", "--by-rounding"]) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = shrink(gated)
    config, before, after = expected.config, gated.num_parameters(), expected.num_parameters()
    assert config.heads[:2] == [None, []] and config.ffn_dims[2] == 0
    macs = [gated.macs(10), expected.macs(10)]
    assert [" ".join(line.split()) for line in lines[2:] if line] == [
        "convolution conv channels",
        *(f"{i} {channels} / 16" for i, channels in enumerate(config.conv_channels)),
        "layer heads FFN units",
        f"1 removed {config.ffn_dims[0]} / 48",
        f"2 bias only {config.ffn_dims[1]} / 48",
        f"3 {len(config.heads[2])} / 4 bias only",
        "before after left",
        f"parameters {before:,} {after:,} {after / before:.2%}",
        f"MACs, 10 s of audio {macs[0]:,} {macs[1]:,} {macs[1] / macs[0]:.2%}",
        f"sparsity of {before:,} parameters",
        "asked by rounding",
        f"expected {1 - expected_parameters(gated).item() / before:.4f}",
        f"actual {1 - after / before:.4f}",
    ]
    blocks = "\n".join(lines).split("\n\n")[1:]
    for block in blocks:  # aligned: all rows of a table end in the same column
        assert len({len(line) for line in block.splitlines()[1:]}) == 1
    assert list(stage1.parent.iterdir()) == [stage1]


def test_by_rounding_keeps_the_outputs_of_evaluation(stage1: Path, gated: SpeechEncoder, small: Any) -> None:
    out = stage1.with_name("small.safetensors")
    assert main([str(stage1), str(out), "--by-rounding"]) == 0
    with torch.no_grad():
        want, got = gated(small.waves()), load_encoder(out)(small.waves())
    for x, y in zip(want.hidden_states, got.hidden_states):
        assert (x - y).norm() / x.norm() < 1e-5


def test_another_sparsity_may_be_asked_for(stage1: Path, gated: SpeechEncoder) -> None:
    sizes = {}
    for sparsity in ("0.4", "0.7"):
        out = stage1.with_name(f"{sparsity}.safetensors")
        assert main([str(stage1), str(out), "--sparsity", sparsity]) == 0
        sizes[sparsity] = 1 - load_encoder(out).num_parameters() / gated.num_parameters()
    assert sizes == {"0.4": pytest.approx(0.4, abs=2e-3), "0.7": pytest.approx(0.7, abs=2e-3)}


def test_macs_may_be_what_goes(stage1: Path, gated: SpeechEncoder, capsys: Any) -> None:
    out = stage1.with_name("small.safetensors")
    assert main([str(stage1), str(out), "--cost", "macs", "--seconds", "2", "--sparsity", "0.6"]) == 0
    small = load_encoder(out)
    gone = 1 - small.macs(2) / gated.macs(2)
    assert gone == pytest.approx(0.6, abs=2e-3) and small.config == shrink(gated, 0.6, MacCost(2.0)).config
    said = read_source(out).provenance
    assert (said["cost"], said["cost_seconds"], said["sparsity"]["actual"]) == ("macs", 2.0, pytest.approx(gone))
    assert f"sparsity of {gated.macs(2):,} MACs for 2 s of audio" in capsys.readouterr().out
    # Stage 1's target does not apply to another cost; a target of MACs needs no option.
    assert main([str(stage1), "--table-only", "--cost", "macs"]) != 0
    assert re.search(says(stage1, "target_sparsity", "MACs for 10 s", "--sparsity"), capsys.readouterr().err)
    save_encoder(gated, stage1, {"target_sparsity": 0.6, "cost": "macs", "cost_seconds": 2.0})
    assert main([str(stage1), str(out)]) == 0
    assert load_encoder(out).config == small.config


def test_a_sparsity_far_from_what_the_gates_expect_is_warned_of(
    stage1: Path, gated: SpeechEncoder, capsys: Any
) -> None:
    expected = 1 - expected_parameters(gated).item() / gated.num_parameters()
    for asked, warned in ((expected + 0.04, False), (expected + 0.06, True), (expected - 0.06, True)):
        assert main([str(stage1), "--table-only", "--sparsity", f"{asked:.3f}"]) == 0
        said = capsys.readouterr().err
        assert bool(said) == warned
        assert not said or re.search(says("warning", "--sparsity", f"{asked:.3f}", "0.06", f"{expected:.4f}"), said)
    assert main([str(stage1), "--table-only", "--by-rounding"]) == 0
    assert not capsys.readouterr().err
    assert expected == pytest.approx(0.528, abs=0.005)
    assert main([str(stage1), "--table-only"]) == 0  # 0.6, the target in the file
    assert re.search(says("warning", stage1, "target_sparsity", 0.6, "0.07"), capsys.readouterr().err)


@pytest.mark.slow
def test_one_run_of_stage_1_serves_for_another_sparsity_nearby(tmp_path: Path) -> None:
    """Trained for 0.75, cut at 0.8; stage 2 starts from the file. Uses the example's teacher and few updates."""
    where = [f"task.data={EXAMPLE / 'data'}", f"task.teacher={EXAMPLE / 'teacher' / 'teacher.safetensors'}"]
    where += ["criterion.groups=[[0],[1,2,3,4],[5,6,7,8],[9,10,11,12]]", "dataset.max_tokens=48000"]
    never = ["dataset.validate_interval_updates=0", "checkpoint.save_interval_updates=0"]
    groups = ("default", "gates", "multipliers")
    train(
        tmp_path / "stage1",
        "distill",
        *where,
        *never,
        "optimization.max_update=100",
        "criterion.sparsity_warmup=30",
        "optimizer.groups.gates.lr_float=0.3",
        "optimizer.groups.multipliers.lr_float=0.1",
        *(f"optimizer.groups.{group}.lr_scheduler.warmup_updates=15" for group in groups),
    )
    checkpoint, out = tmp_path / "stage1" / "checkpoint_last.pt", tmp_path / "small.safetensors"
    full = load_encoder(EXAMPLE / "teacher" / "teacher.safetensors").num_parameters()
    assert main([str(checkpoint), str(out), "--sparsity", "0.8"]) == 0
    small = load_encoder(out)
    assert abs(small.num_parameters() - 0.2 * full) < 0.001 * full
    assert read_source(out).provenance["target_sparsity"] == 0.75
    sizes = read_source(out).provenance["sparsity"]
    assert sizes["asked"] == 0.8 and 0.65 < sizes["expected"] < 0.85
    start = [f"model.init_from={out}", f"criterion.init_from={checkpoint}", "lr_scheduler.warmup_updates=1"]
    train(tmp_path / "stage2", "final", *where, *never, *start, "optimization.max_update=2")
    student = load_encoder(tmp_path / "stage2" / "checkpoint_last.pt")
    assert student.config == small.config and student.num_parameters() == small.num_parameters()
    steps = [(a - b).abs().max().item() for a, b in zip(student.parameters(), small.parameters())]
    assert 0 < max(steps) < 0.003  # two Adam updates of 0.001 away from the file


def fails(capsys: Any, *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    return message


def test_bad_input_is_one_line_and_exit_code_2(
    stage1: Path, gated: SpeechEncoder, teacher_file: Path, capsys: Any
) -> None:
    folder = stage1.parent
    out = folder / "small.safetensors"
    assert re.search(says(teacher_file, "gates"), fails(capsys, teacher_file, out))
    assert re.search(says(folder / "gone.pt"), fails(capsys, folder / "gone.pt", out))
    assert re.search(says("--sparsity: 0.999", "cannot"), fails(capsys, stage1, out, "--sparsity", 0.999))
    assert re.search(says("--sparsity: 1.5", "below 1"), fails(capsys, stage1, out, "--sparsity", 1.5))
    assert ".safetensors" in fails(capsys, stage1, folder / "small.pt")
    untargeted = folder / "untargeted.safetensors"
    save_encoder(gated, untargeted)
    assert "criterion.target_sparsity" in fails(capsys, untargeted, out)
    broken = folder / "broken.pt"
    broken.write_bytes(b"PK\x03\x04 and nothing more")
    assert "truncated" in fails(capsys, broken, out)
    assert sorted(folder.iterdir()) == sorted([stage1, untargeted, broken])


@pytest.mark.parametrize("arguments", [[], ["a.pt"], ["a.pt", "b.safetensors", "--sparsity", "1", "--by-rounding"]])
def test_wrong_usage(arguments: list, capsys: pytest.CaptureFixture) -> None:
    assert "see skill-shrink --help" in fails(capsys, *arguments)
