"""Tables as plain text and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table of plain text: the first ``left`` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [[c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))] for row in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def markdown(rows: Sequence[Sequence[object]]) -> str:
    """A table of Markdown, whose first row is its head."""
    cells = [[str(cell).replace("|", r"\|").replace("\n", " ") for cell in row] for row in rows]
    head, *others = ["|" + "".join(f" {cell} |" if cell else " |" for cell in row) for row in cells]
    return "\n".join([head, "|" + "---|" * len(cells[0]), *others])
