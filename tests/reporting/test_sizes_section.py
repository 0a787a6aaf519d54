"""Every size of an elastic run, compared with students that were trained for one size."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from skill_fairseq.checkpoints import load_encoder, save_encoder
from skill_fairseq.pruning.magnitude import prune_by_magnitude
from skill_fairseq.reporting.sizes_section import size_files, sizes_section

pytest.importorskip("matplotlib")


@pytest.fixture
def run(small: Any, tmp_path: Path) -> Path:
    """Students from skill-shrink --size 0.5 --size 0.25, and one that was trained for a half."""
    folder, teacher = tmp_path / "run", small.random_encoder()
    (folder / "dedicated").mkdir(parents=True)
    for size in (0.5, 0.25):
        student = prune_by_magnitude(teacher, 1 - size, ["conv", "heads", "ffn"])
        save_encoder(student, folder / f"student-{size}.safetensors", {"elastic": {"smallest": 0.2, "largest": 0.5}})
    save_encoder(prune_by_magnitude(teacher, 0.5, ["heads", "ffn"]), folder / "dedicated" / "half.safetensors")
    save_encoder(teacher, folder / "other-0.5.safetensors")  # not from an elastic run
    return folder


def test_files_are_those_of_the_run_and_the_dedicated_ones(run: Path) -> None:
    found = {kind: [path.stem for path in paths] for kind, paths in size_files(run).items()}
    assert found == {"one elastic run": ["student-0.25", "student-0.5"], "a run for each size": ["half"]}
    (run / "student-0.25.safetensors").unlink()
    assert size_files(run) == {}  # one size is not a series


def test_the_table_and_its_pictures(run: Path, small: Any, speech: Path, tmp_path: Path) -> None:
    probes = [
        {"model": f"student-{size}", "task": "digit", "value": value} for size, value in ((0.5, 0.8), (0.25, 0.6))
    ]
    recordings = sorted((speech / "valid").glob("*.wav"))[:2]
    (tmp_path / "out").mkdir()
    html = sizes_section(size_files(run), small.random_encoder(), recordings, probes, tmp_path / "out")
    rows = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", html, re.S)]
    found = {row[0]: row for row in rows[1:]}
    assert list(found) == ["student-0.25", "student-0.5", "half"]
    for name, row in found.items():
        file = run / ("dedicated/half.safetensors" if name == "half" else f"{name}.safetensors")
        assert row[2] == f"{load_encoder(file).num_parameters():,}"
    assert float(found["student-0.25"][5]) > float(found["student-0.5"][5]) > 0  # farther from the teacher
    assert [row[6] for row in found.values()] == ["60.0000", "80.0000", "-"]
    assert len(list((tmp_path / "out").glob("sizes_*.png"))) == 2
