"""The README's table of formats, made from the tests that hold each format against the program it belongs to.

    python tests/formats.py           prints it
    python tests/formats.py --write   puts it into README.md, between <!-- formats --> and <!-- /formats -->

A test says what it covers by ``@pytest.mark.formats(direction, what, against)``: direction "in" (we read it) or "out"
(we write it), the format, and what it is tested against.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
README = TESTS.parent / "README.md"
BEGIN, END = "<!-- formats -->", "<!-- /formats -->"

Marker = tuple[str, str, str]
"""(direction, format, tested against)."""


class Collector:
    """A pytest plugin that keeps the markers of the tests that were collected."""

    def __init__(self) -> None:
        self.markers: list[Marker] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Called by pytest."""
        for item in items:
            for marker in item.iter_markers("formats"):
                if len(marker.args) != 3 or marker.args[0] not in ("in", "out") or marker.kwargs:
                    raise ValueError(f"{item.nodeid}: formats{marker.args}; expected ('in' or 'out', what, against)")
                if marker.args not in self.markers:
                    self.markers.append(marker.args)


def collect(folder: Path = TESTS) -> list[Marker]:
    """The markers of all tests below a folder; only files that have any are imported.

    Raises:
        RuntimeError: the tests cannot be collected, or a marker is not of the form; shows what pytest said.
    """
    ours = (file for file in sorted(folder.rglob("test_*.py")) if ".venv" not in file.parts)
    files = [str(file) for file in ours if "mark.formats(" in file.read_text("utf-8")]
    collector, said = Collector(), io.StringIO()
    if files:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *files], plugins=[collector])
        if code != 0:
            raise RuntimeError(f"pytest could not collect the tests:\n{said.getvalue()}")
    return collector.markers


def table(markers: Iterable[Marker]) -> str:
    """Markdown: a row for each format, and in which direction it is tested against what."""
    rows: dict[str, dict[str, list[str]]] = {}
    for direction, what, against in markers:
        rows.setdefault(what, {"in": [], "out": []})[direction].append(against)
    lines = ["| format | in, tested against | out, tested against |", "|---|---|---|"]
    for what in sorted(rows, key=str.casefold):
        cells = (", ".join(sorted(set(rows[what][direction]))) or "-" for direction in ("in", "out"))
        lines.append(f"| {' | '.join([what, *cells])} |")
    return "\n".join(lines)


def split(text: str) -> tuple[str, str, str]:
    """A README's text before the table, the table, and after it.

    Raises:
        ValueError: the two lines that mark its place are missing.
    """
    before, begin, rest = text.partition(f"{BEGIN}\n")
    inside, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md: the lines {BEGIN} and {END} are missing; put them where the table belongs")
    return before + begin, inside.strip("\n"), end + after


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description="Make the README's table of formats from the tests' markers.")
    parser.add_argument("--write", action="store_true", help="put it into README.md; otherwise print it")
    parser.add_argument("--readme", type=Path, default=README, help=argparse.SUPPRESS)
    parser.add_argument("--tests", type=Path, default=TESTS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    made = table(collect(args.tests))
    if not args.write:
        print(made)
        return 0
    before, _, after = split(args.readme.read_text(encoding="utf-8"))
    args.readme.write_text(f"{before}{made}\n{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
