"""The tiny recipe in both stages against a recorded run: refactoring changes no number.

``python tests/test_trajectory.py --write`` records it again; the commit must say why numbers changed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import ENVIRONMENT, train

from skill_fairseq.checkpoints import load_encoder
from skill_fairseq.checkpoints.safe_load import load_torch_file

RECORD = Path(__file__).with_name("trajectory.json")
TINY = Path(__file__).resolve().parents[1] / "examples" / "tiny"
UPDATES = 20, 10
COMMON_KERNELS = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"}
"""What every x86 processor has: by its own fastest instructions each would add in another order."""


def machine() -> list[str]:
    """Everything that determines the last bit of a number."""
    model = [" ".join(x.split()) for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model")]
    return [torch.__version__, platform.machine(), *model[:2]]


def measure(folder: Path) -> dict[str, Any]:
    """Trains; the norm of every tensor after each stage, the student's shape, and the last losses."""
    data = [f"task.data={TINY / 'data'}", f"task.teacher={TINY / 'teacher' / 'teacher.safetensors'}"]
    groups = "criterion.groups=[[0],[1,2],[3,4,5,6,7,8,9],[10,11,12]]"
    short = [*data, groups, "checkpoint.save_interval_updates=0", "dataset.validate_interval_updates=1000"]
    found: dict[str, Any] = {}
    for stage, updates in zip(("distill", "final"), UPDATES):
        start = [f"model.init_from={folder / 'distill' / 'checkpoint_last.pt'}"] if stage == "final" else []
        train(folder / stage, stage, *short, *start, f"optimization.max_update={updates}")
        last = folder / stage / "checkpoint_last.pt"
        saved = load_torch_file(last)
        assert saved["optimizer_history"][-1]["num_updates"] == updates
        weights = {**saved["model"], **{f"criterion.{name}": value for name, value in saved["criterion"].items()}}
        found[stage] = {name: float(value.double().norm()) for name, value in sorted(weights.items())}
        found[f"{stage} loss"] = saved["extra_state"]["val_loss"]
        shape = load_encoder(last).config
        found[f"{stage} shape"] = [shape.conv_channels, shape.heads, shape.ffn_dims]
    return found


@pytest.mark.slow
def test_numbers_are_those_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in COMMON_KERNELS.items():
        monkeypatch.setitem(ENVIRONMENT, name, value)
    recorded = json.loads(RECORD.read_text())
    found = json.loads(json.dumps(measure(tmp_path)))
    assert found["final shape"] == recorded["final shape"]
    for stage in ("distill", "final"):
        assert set(found[stage]) == set(recorded[stage])
    same = machine() == recorded["machine"]
    for stage in ("distill", "final"):
        for name, value in recorded[stage].items():
            # A softmax does not depend on its keys' bias: only rounding of a zero gradient moves it.
            noise = 1e-4 if name.endswith("k_proj.bias") else 1e-6
            assert found[stage][name] == (value if same else pytest.approx(value, rel=1e-4, abs=noise)), name
        assert found[f"{stage} loss"] == pytest.approx(recorded[f"{stage} loss"], rel=0 if same else 1e-4)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", required=True, help="record the run of this machine")
    parser.parse_args()
    ENVIRONMENT.update(COMMON_KERNELS)
    with tempfile.TemporaryDirectory() as temporary:
        record = {"machine": machine(), **measure(Path(temporary))}
    temporary_name = RECORD.with_suffix(f".{os.getpid()}")
    temporary_name.write_text(json.dumps(record, indent=1) + "\n")
    temporary_name.rename(RECORD)
