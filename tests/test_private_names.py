"""Private names of other libraries: all used ones are listed, and all listed ones exist."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import skill_fairseq
from skill_fairseq.private_names import PRIVATE_NAMES

ROOT = Path(skill_fairseq.__file__).parent
PUBLIC = {"_replace", "_asdict", "_exit"}  # documented, of named tuples and os
TREES = {file.relative_to(ROOT).as_posix(): ast.parse(file.read_text()) for file in sorted(ROOT.rglob("*.py"))}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name not in PUBLIC


def own_names() -> set[str]:
    """Names that the package defines itself: functions, classes, variables and attributes of self."""
    found = set()
    for node in (node for tree in TREES.values() for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            found.add(node.attr)
        elif isinstance(node, ast.keyword) and node.arg:
            found.add(node.arg)  # vars(self).update(_module=module)
    return found


def foreign_names(tree: ast.AST, own: set[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if node.attr not in own or ast.unparse(node.value) == "super()":
                yield node.attr
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            if not any(module.startswith(("skill_fairseq", "_skill_fairseq")) for module in modules):
                yield from (word for module in modules for word in module.split(".") if is_private(word))


def test_every_private_name_of_another_library_is_listed() -> None:
    own, listed = own_names(), {(file, name.rpartition(".")[2]) for name, (file, _) in PRIVATE_NAMES.items()}
    found = {(file, name) for file, tree in TREES.items() for name in foreign_names(tree, own)}
    assert len(found) > 15 and found <= listed


def test_every_listed_name_is_used_where_the_list_says() -> None:
    for name, (file, reason) in PRIVATE_NAMES.items():
        assert name.rpartition(".")[2] in (ROOT / file).read_text(), name
        assert reason, name


@pytest.mark.parametrize("name", PRIVATE_NAMES)
def test_every_listed_name_is_there(name: str) -> None:
    words, place = name.split("."), 1
    if name.startswith("torch.ops.mkldnn.") and int(torch.__version__.split(".")[0]) < 2:
        pytest.skip("younger than this torch")
    if words[0] == "transformers":
        sys.modules.setdefault("torchaudio", None)  # type: ignore[arg-type]  # transformers tries a broken one
        pytest.importorskip("transformers")
    found: Any = importlib.import_module(words[0])
    for place, word in enumerate(words[1:], start=1):
        try:
            found = getattr(found, word)
        except AttributeError:
            if not inspect.ismodule(found):
                break
            try:
                found = importlib.import_module(".".join(words[: place + 1]))
            except ImportError:
                break
    else:
        return
    assert inspect.isclass(found) and place == len(words) - 1, f"{'.'.join(words[: place + 1])} is gone"
    assert f"self.{words[-1]}" in inspect.getsource(found)  # an attribute set on creation of objects
