"""Generates the pages' tables from the tests: formats and their references; faults and their handling.

    python tests/tables.py           prints them
    python tests/tables.py --write   puts them into their pages, each between <!-- name --> and <!-- /name -->

Markers on tests give the rows. ``@pytest.mark.formats(direction, what, against)``: direction "in" (we read it) or "out"
(we write it), the format, and the reference. ``@pytest.mark.faults(fault, outcome)``: a fault in a run, and the
outcome.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
PAGES = {
    "formats": TESTS.parent / "examples/formats/README.md",
    "faults": TESTS.parent / "examples/librispeech/README.md",
}
FORMS = {"formats": "('in' or 'out', what, against)", "faults": "(fault, outcome)"}

Marked = tuple[tuple[str, ...], str]
"""A marker's arguments, and the test: file and function."""


class Collector:
    """A pytest plugin that collects the markers of the tests."""

    def __init__(self) -> None:
        self.found: dict[str, list[Marked]] = {name: [] for name in FORMS}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Called by pytest."""
        for item in items:
            for name, form in FORMS.items():
                for marker in item.iter_markers(name):
                    args = marker.args
                    fits = len(args) == form.count(",") + 1 and (name == "faults" or args[0] in ("in", "out"))
                    if not fits or marker.kwargs:
                        raise ValueError(f"{item.nodeid}: {name}{args}; expected {form}")
                    entry = (args, item.nodeid.partition("[")[0])
                    if entry not in self.found[name]:
                        self.found[name].append(entry)


def collect(folder: Path = TESTS) -> dict[str, list[Marked]]:
    """The markers of all tests below a folder, by name; imports only files that have any.

    Raises:
        RuntimeError: the tests cannot be collected, or a marker is malformed; shows pytest's output.
    """
    hidden = {".venv", ".matrix"}  # environments, whose packages have tests of their own
    ours = (file for file in sorted(folder.rglob("test_*.py")) if not hidden & set(file.parts))
    files = [str(file) for file in ours if any(f"mark.{name}(" in file.read_text("utf-8") for name in FORMS)]
    collector, said = Collector(), io.StringIO()
    if files:
        options = ["--collect-only", "-q", "-p", "no:cacheprovider", "-m", "nightly or not nightly"]
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = pytest.main([*options, *files], plugins=[collector])
        if code != 0:
            raise RuntimeError(f"pytest could not collect the tests:\n{said.getvalue()}")
    return collector.found


def formats_table(found: Sequence[Marked]) -> str:
    """Markdown: a row for each format, with its references by direction."""
    rows: dict[str, dict[str, list[str]]] = {}
    for (direction, what, against), _ in found:
        rows.setdefault(what, {"in": [], "out": []})[direction].append(against)
    lines = ["| format | in, tested against | out, tested against |", "|---|---|---|"]
    for what in sorted(rows, key=str.casefold):
        cells = (", ".join(sorted(set(rows[what][direction]))) or "-" for direction in ("in", "out"))
        lines.append(f"| {' | '.join([what, *cells])} |")
    return "\n".join(lines)


def faults_table(found: Sequence[Marked]) -> str:
    """Markdown: a row for each fault, in the tests' order, with its outcome and tests."""
    rows: dict[str, tuple[str, list[str]]] = {}
    for (fault, outcome), test in found:
        tests = rows.setdefault(fault, (outcome, []))[1]
        file, _, function = test.rpartition("::")
        tests.append(f"`{Path(file).name}::{function}`")
    lines = ["| what goes wrong | what happens | shown by |", "|---|---|---|"]
    lines += [f"| {fault} | {outcome} | {', '.join(tests)} |" for fault, (outcome, tests) in rows.items()]
    return "\n".join(lines)


TABLES = {"formats": formats_table, "faults": faults_table}


def split(text: str, name: str) -> tuple[str, str, str]:
    """A page's text before a table, the table, and the text after it.

    Raises:
        ValueError: the two marker lines are missing.
    """
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, begin, rest = text.partition(f"{first}\n")
    inside, end, after = rest.partition(last)
    if not (begin and end):
        raise ValueError(f"the lines {first} and {last} are missing; put them where the table belongs")
    return before + begin, inside.strip("\n"), end + after


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(description="Make the pages' tables from the tests' markers.")
    parser.add_argument("--write", action="store_true", help="put them into their pages; otherwise print them")
    parser.add_argument("--page", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--tests", type=Path, default=TESTS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    made = {name: TABLES[name](found) for name, found in collect(args.tests).items()}
    if not args.write:
        print("\n\n".join(made.values()))
        return 0
    for name, table in made.items():
        page = args.page or PAGES[name]
        before, _, after = split(page.read_text(encoding="utf-8"), name)
        page.write_text(f"{before}{table}\n{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
