"""Bundles the package's own sources into a few standalone files, generated at every export."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "skill_fairseq"


def bundle(*roots: str) -> dict[str, str]:
    """These modules, and all modules of this package that they import, rewritten as files of one folder.

    ``from skill_fairseq.modules.config import X`` becomes ``from .config import X``, the only form that transformers
    follows when it copies a model's code.

    Args:
        roots: full names of modules.

    Returns:
        text of each file by name.

    Raises:
        ValueError: a module imports this package in another form, or two modules have the same last name.
    """
    files: dict[str, str] = {}
    origin: dict[str, str] = {}
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        file = f"{name.rpartition('.')[2]}.py"
        if origin.setdefault(file, name) != name:
            raise ValueError(f"{name} and {origin[file]} would both become {file}; rename one of them")
        if file in files:
            continue
        lines = _source(name).splitlines()
        for imported, line in _imports(name, "\n".join(lines)):
            lines[line] = lines[line].replace(f"from {imported} import", f"from .{imported.rpartition('.')[2]} import")
            waiting.append(imported)
        files[file] = "\n".join([_header(name), *lines, ""])
    return dict(sorted(files.items()))


def _imports(name: str, source: str) -> Iterator[tuple[str, int]]:
    """(module of this package, index of the line) of every import of one."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module or ""]
        else:
            continue
        for module in modules:
            if module.partition(".")[0] != PACKAGE:
                continue
            if isinstance(node, ast.Import) or _path(module).name == "__init__.py":
                raise ValueError(f"{name}, line {node.lineno}: write 'from {module}.MODULE import NAME', to be bundled")
            yield module, node.lineno - 1


def _path(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None, name
    return Path(spec.origin)


def _source(name: str) -> str:
    return _path(name).read_text(encoding="utf-8")


def _header(name: str) -> str:
    from skill_fairseq import __version__

    return (
        f"# {name} of {PACKAGE} {__version__}, written by skill-export.\n"
        f"# Copyright (c) 2026 {PACKAGE} contributors, MIT License."
    )
