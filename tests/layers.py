#!/usr/bin/env python3
"""Checks imports between folders of skill_fairseq against the table in skill_fairseq/README.md.

python tests/layers.py          exits with 1 and names file, line and import if the table forbids one
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "skill_fairseq"
ROW = re.compile(r"^\| `([\w/.]+)` \| *(.+?) *\| *(.*?) *\|$", re.MULTILINE)


def allowed(readme: str) -> dict[str, set[str]]:
    """Folder or file -> what it may import, including itself; "all above" means the rows before."""
    table: dict[str, set[str]] = {}
    for name, _, imports in ROW.findall(readme):
        named = set(re.findall(r"`([\w/.]+)`", imports))
        table[name] = {name, *named, *(table if "all above" in imports else ())}
    return table


def home(path: Path, package: Path) -> str:
    """The table's row of a module: its folder, or the module itself at the top level."""
    parts = path.relative_to(package).parts
    return parts[0]


def imports(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """(line, row of the table) of everything that a module imports from the package, at any depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            first, *rest = name.split(".")
            if first == package.name and rest:
                yield node.lineno, rest[0] if (package / rest[0]).is_dir() else f"{rest[0]}.py"


def problems(package: Path = PACKAGE) -> list[str]:
    """One line for every forbidden import, and for every row without a folder or folder without a row."""
    table = allowed((package / "README.md").read_text())
    modules = [path for path in sorted(package.rglob("*.py")) if path.name != "__init__.py" or path.parent != package]
    homes = {home(path, package) for path in modules}
    found = [f"README.md: no row for {name}" for name in sorted(homes - set(table))]
    found += [f"README.md: a row for {name}, which is not there" for name in sorted(set(table) - homes)]
    for path in modules:
        mine = home(path, package)
        for line, other in imports(path, package):
            if mine in table and (package / other).exists() and other not in table[mine]:
                found.append(f"{path.relative_to(package.parent)}:{line}: {mine} may not import {other}")
    return found


if __name__ == "__main__":
    wrong = problems()
    print("\n".join(wrong) or "every import is allowed by the table of skill_fairseq/README.md")
    sys.exit(bool(wrong))
