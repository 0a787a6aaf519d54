"""examples/method.py: its numbers against the package's, and without the package."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    tuple(int(part) for part in torch.__version__.split(".")[:2]) < (1, 13), reason="the script asks for torch 1.13"
)

FILE = Path(__file__).resolve().parents[1] / "examples" / "method.py"
WITHOUT = (
    "import runpy, sys; sys.modules['skill_fairseq'] = None; sys.argv = sys.argv[1:]; "
    "runpy.run_path(sys.argv[0], None, '__main__')"
)


def table(*command: str) -> dict[str, list[str]]:
    """The script's output: the columns of each line of its last table."""
    said = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True, timeout=300).stdout
    rows = [re.split(r"  +", line.strip()) for line in said[said.index("this file") :].splitlines()[1:]]
    return {name: columns for name, *columns in rows}


@pytest.mark.slow
def test_its_numbers_are_the_packages() -> None:
    rows = table(str(FILE), "--updates", "12")
    changes = [float(value) for value in rows.pop("its change by the cut")]
    assert max(changes) < 1e-5 * float(rows["largest output"][0])
    assert rows["groups of layers"][0].count("[") == 5
    for name in ("groups of layers", "parameters of the teacher", "parameters of the student"):
        assert rows[name][0] == rows[name][1], name
        del rows[name]
    assert len(rows) == 4
    for name, (mine, packages) in rows.items():
        assert float(mine) == pytest.approx(float(packages), rel=2e-5), name


@pytest.mark.nightly
def test_it_asks_nothing_of_the_package() -> None:
    rows = table("-c", WITHOUT, str(FILE), "--updates", "12")
    assert int(rows["parameters of the teacher"][0]) == 1_009_948
    assert all(columns[1] == "-" for columns in rows.values())
