"""The README's table of formats is what the tests' markers give."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("formats.py")
spec = importlib.util.spec_from_file_location("formats", SCRIPT)
formats = importlib.util.module_from_spec(spec)
spec.loader.exec_module(formats)

TEST_FILE = """
import pytest

@pytest.mark.formats("out", "ONNX", "onnxruntime")
@pytest.mark.formats("in", "b file", "other")
def test_a(): ...

@pytest.mark.parametrize("way", [pytest.param(1, marks=pytest.mark.formats("in", "b file", "fairseq")), 2, 3])
@pytest.mark.formats("in", "A folder", "fairseq")
def test_b(way): ...

def test_c(): ...
"""
TABLE = """| format | in, tested against | out, tested against |
|---|---|---|
| A folder | fairseq | - |
| b file | fairseq, other | - |
| ONNX | - | onnxruntime |"""


def command(*arguments: object) -> subprocess.CompletedProcess:
    """In a process of its own: pytest within pytest would share its plugins and modules."""
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True)


def test_table_of_markers(tmp_path):
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\nmarkers = ['formats: ...']\n")
    (tmp_path / "test_some.py").write_text(TEST_FILE)
    (tmp_path / "test_broken.py").write_text("not python")  # without markers: not even opened by pytest
    done = command("--tests", tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, TABLE), done.stderr
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n<!-- formats -->\nold\n<!-- /formats -->\nrest\n")
    done = command("--tests", tmp_path, "--readme", readme, "--write")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert readme.read_text() == f"# Title\n<!-- formats -->\n{TABLE}\n<!-- /formats -->\nrest\n"
    (tmp_path / "test_some.py").write_text(TEST_FILE.replace('"out", "ONNX"', '"both", "ONNX"'))
    done = command("--tests", tmp_path)
    assert done.returncode != 0 and "expected ('in' or 'out', what, against)" in done.stderr


def test_readme_without_a_place_for_the_table():
    with pytest.raises(ValueError, match="the lines <!-- formats --> and <!-- /formats --> are missing"):
        formats.split("# Title\n<!-- formats -->\n")


@pytest.mark.slow
def test_readme_has_the_table_that_the_tests_give():
    done = command()
    assert done.returncode == 0, done.stderr
    _, found, _ = formats.split(formats.README.read_text(encoding="utf-8"))
    assert found == done.stdout.strip(), "run python tests/formats.py --write"
