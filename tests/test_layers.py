"""Imports between folders: the table is right, and a forbidden import is found."""

from __future__ import annotations

from pathlib import Path

from tests import layers

TABLE = "| `low` | a | |\n| `high` | b | `low` |\n| `top` | c | all above |\n"


def package(folder: Path, table: str = TABLE, **modules: str) -> Path:
    made = folder / "some"
    made.mkdir()
    (made / "README.md").write_text(table)
    for name, text in modules.items():
        (made / name).mkdir()
        (made / name / "a.py").write_text(text)
    return made


def test_the_package_keeps_to_its_table() -> None:
    assert layers.problems() == []


def test_a_forbidden_import_is_named(tmp_path: Path) -> None:
    low = "import os\n\ndef f():\n    from some.high.a import b\n"
    made = package(tmp_path, low=low, high="from some.low import a\nimport some.top.a\n", top="import some.low.a\n")
    assert layers.problems(made) == [
        "some/high/a.py:2: high may not import top",
        "some/low/a.py:4: low may not import high",
    ]


def test_rows_and_folders_must_agree(tmp_path: Path) -> None:
    made = package(tmp_path, low="", high="", new="")
    assert layers.problems(made) == ["README.md: no row for new", "README.md: a row for top, which is not there"]
