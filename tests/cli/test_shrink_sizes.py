"""skill-shrink --size and --all: sizes, names, and refusals."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from messages import says

from skill_fairseq.checkpoints import load_encoder, save_encoder
from skill_fairseq.checkpoints.load import read_source
from skill_fairseq.cli.shrink import main
from skill_fairseq.pruning.nested import cut_sizes, settle
from tests.pruning.test_shrink import BASE, gated_encoder

UNITS = ("conv", "heads", "ffn")
TRAINED = {"elastic": {"smallest": 0.4, "largest": 0.7}, "target_sparsity": 0.3}


@pytest.fixture(params=["stage 1", "stage 2"])
def checkpoint(request: Any, tmp_path: Path) -> Path:
    encoder = gated_encoder(BASE, UNITS)
    save_encoder(encoder if request.param == "stage 1" else settle(encoder, 0.7), tmp_path / "in.safetensors", TRAINED)
    return tmp_path / "in.safetensors"


def left(path: Path) -> float:
    encoder = load_encoder(path)
    return encoder.num_parameters() / encoder.config.original_parameters


def test_several_sizes_are_named_after_them(checkpoint: Path, capsys: Any) -> None:
    out = checkpoint.with_name("out.safetensors")
    assert main([str(checkpoint), str(out), "--size", "0.5", "--size", "0.65"]) == 0
    wanted = cut_sizes(load_encoder(checkpoint), [0.5, 0.65])
    for size, student in zip((0.5, 0.65), wanted):
        path = out.with_name(f"out-{size}.safetensors")
        found = load_encoder(path)
        assert left(path) == pytest.approx(size, abs=5e-3)
        assert all(torch.equal(found.state_dict()[name], value) for name, value in student.state_dict().items())
        assert read_source(path).provenance["sparsity"]["asked"] == pytest.approx(1 - size)
    assert not out.exists()
    assert main([str(checkpoint), str(out), "--size", "0.5"]) == 0 and left(out) == pytest.approx(0.5, abs=5e-3)
    assert main([str(checkpoint), str(out)]) == 0 and left(out) == pytest.approx(0.7, abs=5e-3)


def test_all_sizes(checkpoint: Path, capsys: Any) -> None:
    assert main([str(checkpoint), "--all", "--table-only"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "asked" in line]
    assert [float(line[-1]) for line in lines] == pytest.approx([0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6])


def test_sizes_that_were_not_trained(checkpoint: Path, capsys: Any) -> None:
    for size in ("0.3", "0.75"):
        assert main([str(checkpoint), "--table-only", "--size", size]) == 2
        assert re.search(says("--size", size, 0.4, 0.7, "--beyond"), capsys.readouterr().err)
    assert main([str(checkpoint), "--table-only", "--size", "0.35", "--beyond"]) == 0
    assert "warning: --size: 0.35" in capsys.readouterr().err
    assert main([str(checkpoint), "--table-only", "--size", "0.5", "--sparsity", "0.5"]) == 2


def test_of_a_checkpoint_of_one_size_sizes_are_refused(tmp_path: Path, capsys: Any) -> None:
    save_encoder(gated_encoder(BASE, UNITS), tmp_path / "in.safetensors", {"target_sparsity": 0.5})
    for option in (["--size", "0.5"], ["--all"]):
        assert main([str(tmp_path / "in.safetensors"), "--table-only", *option]) == 2
        said = capsys.readouterr().err
        assert option[0] in said and "criterion.elastic" in said and "--sparsity" in said
