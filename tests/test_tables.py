"""The pages' tables match the tests' markers."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from messages import says

SCRIPT = Path(__file__).with_name("tables.py")
spec = importlib.util.spec_from_file_location("tables", SCRIPT)
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)

TEST_FILE = """
import pytest

@pytest.mark.formats("out", "ONNX", "onnxruntime")
@pytest.mark.formats("in", "b file", "other")
def test_a(): ...

@pytest.mark.parametrize("way", [pytest.param(1, marks=pytest.mark.formats("in", "b file", "fairseq")), 2, 3])
@pytest.mark.formats("in", "A folder", "fairseq")
@pytest.mark.faults("the disk is full", "the run ends")
def test_b(way): ...

@pytest.mark.faults("the disk is full", "the run ends")
@pytest.mark.faults("a kill", "it goes on")
def test_c(): ...

def test_d(): ...
"""
FORMATS = """| format | in, tested against | out, tested against |
|---|---|---|
| A folder | fairseq | - |
| b file | fairseq, other | - |
| ONNX | - | onnxruntime |"""
FAULTS = """| what goes wrong | what happens | shown by |
|---|---|---|
| the disk is full | the run ends | `test_some.py::test_b`, `test_some.py::test_c` |
| a kill | it goes on | `test_some.py::test_c` |"""


def command(*arguments: object) -> subprocess.CompletedProcess:
    """In a new process, because pytest within pytest would share plugins and modules."""
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True)


def test_tables_of_markers(tmp_path):
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\nmarkers = ['formats: ...', 'faults: ...']\n")
    (tmp_path / "test_some.py").write_text(TEST_FILE)
    (tmp_path / "test_broken.py").write_text("not python")  # without markers: pytest does not even open it
    done = command("--tests", tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{FORMATS}\n\n{FAULTS}\n"), done.stderr
    readme = tmp_path / "README.md"
    before, after = "# Title\n<!-- faults -->\n", "<!-- /formats -->\nend\n"
    between = "<!-- /faults -->\nand\n<!-- formats -->\n"
    readme.write_text(f"{before}{between}old\n{after}")
    done = command("--tests", tmp_path, "--page", readme, "--write")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert readme.read_text() == f"{before}{FAULTS}\n{between}{FORMATS}\n{after}"
    (tmp_path / "test_some.py").write_text(TEST_FILE.replace('"out", "ONNX"', '"both", "ONNX"'))
    done = command("--tests", tmp_path)
    assert done.returncode != 0 and "expected ('in' or 'out', what, against)" in done.stderr
    (tmp_path / "test_some.py").write_text(TEST_FILE.replace('"a kill", ', ""))
    done = command("--tests", tmp_path)
    assert done.returncode != 0 and "expected (fault, outcome)" in done.stderr


def test_a_page_without_a_place_for_the_table():
    with pytest.raises(ValueError, match=says("<!-- formats -->", "<!-- /formats -->", "missing")):
        tables.split("# Title\n<!-- formats -->\n", "formats")


@pytest.mark.slow
def test_pages_have_the_tables_that_the_tests_give():
    done = command()
    assert done.returncode == 0, done.stderr
    pages = {name: tables.PAGES[name].read_text(encoding="utf-8") for name in tables.TABLES}
    found = "\n\n".join(tables.split(text, name)[1] for name, text in pages.items())
    assert found == done.stdout.strip(), "run python tests/tables.py --write"
