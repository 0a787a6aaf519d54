"""Tables as plain text and as Markdown."""

from __future__ import annotations

from skill_fairseq.text_tables import aligned, markdown


def test_columns_are_aligned() -> None:
    rows = [["", "s", "GB"], ["train", "0.5", "12"], ["a", "10.25", ""]]
    assert aligned(rows) == "           s  GB\ntrain    0.5  12\na      10.25"
    assert aligned(rows, left=2) == "       s      GB\ntrain  0.5    12\na      10.25"


def test_markdown_keeps_a_cell_in_its_row() -> None:
    assert markdown([["a", ""], ["x|y", 1], ["two\nlines", ""]]) == "| a | |\n|---|---|\n| x\\|y | 1 |\n| two lines | |"
