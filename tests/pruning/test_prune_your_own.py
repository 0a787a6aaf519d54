"""The example of your own training loop: short, without fairseq, and as its page describes."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "prune_your_own"
SCRIPT = FOLDER / "speaker_identification.py"


def test_it_has_fewer_than_80_lines_of_code() -> None:
    source = SCRIPT.read_text()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node.body[0] for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    strings = [n for n in nodes if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    prose = {line for n in strings for line in range(n.lineno, (n.end_lineno or n.lineno) + 1)}
    code = [
        line
        for number, line in enumerate(source.splitlines(), 1)
        if line.strip() and not line.lstrip().startswith("#") and number not in prose
    ]
    assert len(code) < 80
    assert f"in {len(code)} lines of code" in (FOLDER / "README.md").read_text()


@pytest.mark.slow
def test_it_prunes_by_70_percent_without_fairseq() -> None:
    absent = "fairseq fairseq_cli hydra omegaconf transformers"
    code = f"import sys, runpy; sys.modules.update(dict.fromkeys('{absent}'.split()))\n"
    code += f"sys.argv = ['example', '--updates', '5']; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    env = {**os.environ, "SKILL_FAIRSEQ_HOOK": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    number = r"([\d.]+)"
    line = rf"(\w+): ([\d,]+) parameters, accuracy {number}% \(95 % interval over speakers {number}% to {number}%\)"
    rows = {name: [float(n.replace(",", "")) for n in numbers] for name, *numbers in re.findall(line, done.stdout)}
    assert set(rows) == {"before", "pruned", "after"}
    assert abs(rows["pruned"][0] / rows["before"][0] - 0.3) < 1e-3 and rows["after"][0] == rows["pruned"][0]
    assert all(0 <= low <= accuracy <= high <= 100 and low < high for _, accuracy, low, high in rows.values())
