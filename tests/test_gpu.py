"""tests/gpu/run.sh runs on a CPU with small shapes, with the expected findings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(torch, "get_autocast_dtype"), reason="torch < 2.4 has no half precision on CPUs"),
]


@pytest.mark.nightly
def test_the_checks_for_a_gpu_run_on_a_cpu(tmp_path: Path) -> None:
    script = Path(__file__).with_name("gpu") / "run.sh"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", str(script), str(tmp_path / "out"), "--device", "cpu"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results) == ["machine", "seconds", "numerics", "speed", "waits", "precisions", "kills"]
    rows = results["numerics"]["rows"]
    assert len(rows) == 24 and all(row["ok"] for row in rows.values())
    assert rows["gloo with one rank, gradients"]["error"] == 0.0
    assert 0 < rows["base: bfloat16 by cast, gradients"]["error"] < rows["base: bfloat16 by cast, gradients"]["limit"]
    assert list(results["speed"]["stage 1, gates open"]) == ["skill_fairseq", "transformers"]
    assert results["waits"]["events"]["wait: open gates"]["calls"] == 1
    assert results["kills"]["identical bits"] is True
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| stage 2, student of 25 % |" in table and "| base: float32, states |" in table
