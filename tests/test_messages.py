"""Messages for users: escapes, shell lines, and which errors are the user's."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import numpy as np
import pytest
import torch
from messages import says

from skill_fairseq.checkpoints import load_encoder
from skill_fairseq.messages import (
    EXTRAS,
    meant_for_users,
    out_of_memory,
    printable,
    remedy_for,
    require,
    require_linux,
    shell_quote,
)

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPTS = [path for path in sorted(REPOSITORY.glob("[et]*/**/*.sh")) if "set -euo pipefail" in path.read_text()]
NAMES = [
    "a b",
    "l'\u00e9t\u00e9;touch RAN;",
    "$(touch RAN)",
    "-n",
    "\x1b[31mred",
    "a\nb\t'\\c",
    "caf\udce9",
    "\u202egpj",
    "`x`!*",
]


def test_control_characters_become_escapes() -> None:
    assert printable("\x1b[31mred\x07 a\nb\tc \udce9 \u202e \x9b") == r"\x1b[31mred\x07 a\nb\tc \xe9 \u202e \x9b"
    assert (
        printable("two  blanks, \u00e9 and \u4f60\u3000\u597d stay")
        == "two  blanks, \u00e9 and \u4f60\u3000\u597d stay"
    )
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b"


@pytest.mark.parametrize("name", NAMES)
def test_a_quoted_name_is_one_word_of_the_shell_and_shows_no_controls(name: str) -> None:
    quoted = shell_quote(name)
    assert quoted == printable(quoted)
    said = subprocess.run(["bash", "-c", f"printf %s {quoted}"], capture_output=True, check=True).stdout
    assert said == name.encode("utf-8", "surrogateescape")


def error_of(cause: object) -> BaseException:
    try:
        cause()  # type: ignore[operator]
    except BaseException as error:
        return error
    raise AssertionError("no error")


def test_only_errors_that_are_raised_for_users_are_theirs(tmp_path: object) -> None:
    assert meant_for_users(error_of(lambda: load_encoder(f"{tmp_path}/none.pt")))
    assert meant_for_users(error_of(lambda: require("--plot", "no_such_module")))
    assert meant_for_users(error_of(lambda: open(f"{tmp_path}/none")))
    assert meant_for_users(error_of(lambda: __import__("no_such_module")))
    for defect in (
        lambda: int("x"),
        lambda: np.ones(2) + np.ones(3),
        lambda: printable(b"\xff".decode()),
        lambda: torch.ones(2) + torch.ones(3),
        lambda: {}["key"],
        lambda: __import__("skill_fairseq.no_such_module"),
    ):
        assert not meant_for_users(error_of(defect), "tests")


def test_a_lack_of_memory_has_its_own_signs() -> None:
    assert out_of_memory(error_of(lambda: torch.empty(1 << 60)))
    assert out_of_memory(error_of(lambda: np.empty(1 << 60, dtype=np.uint8)))
    assert out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    for other in ("CUDA error: an illegal memory access was encountered", "CUDA error: device-side assert triggered"):
        assert not out_of_memory(RuntimeError(other))
    assert not out_of_memory(ValueError("out of memory"))


def test_extras_are_those_of_the_package() -> None:
    names = {"sklearn": "scikit-learn"}
    declared = {
        tuple(line.replace('"', "'").split("; extra == "))
        for line in requires("skill_fairseq") or []
        if "extra" in line
    }
    for module, extra in EXTRAS.items():
        assert any(
            line[0].split("=")[0].split(";")[0].split("<")[0].strip() == names.get(module, module)
            and f"'{extra}'" in line[-1]
            for line in declared
        ), module
        assert remedy_for(module).startswith(f"pip install '.[{extra}]'")


def test_what_is_missing_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    require("--plot", "json", "numpy")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ValueError, match=says("--plot", "matplotlib", "pip install '.[plots]'")):
        require("--plot", "matplotlib")


def test_another_system_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    require_linux("skill-cluster")
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(OSError, match=says("skill-cluster", "'darwin'", "'linux'")):
        require_linux("skill-cluster")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: str(script.relative_to(REPOSITORY)))
def test_scripts_say_that_they_need_another_bash(script: Path) -> None:
    """macOS has bash 3.2, where an empty array is an error under `set -u`."""
    guard = [line for line in script.read_text().splitlines() if "BASH_VERSINFO" in line]
    assert len(guard) == 1
    for version, code in (("3 2", 2), ("4 3", 2), ("4 4", 0), ("5 0", 0)):
        line = guard[0].replace("BASH_VERSINFO", "version")
        done = subprocess.run(["bash", "-c", f"version=({version}); {line}; exit 0"], capture_output=True, text=True)
        assert done.returncode == code and ("expected 4.4 or later" in done.stderr) == bool(code)


def test_an_error_of_a_file_beside_the_program_is_meant_for_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(tmp_path / "run.py"), raising=False)
    for folder, meant in ((tmp_path, True), (tmp_path / "other", False)):
        code = compile("raise ValueError('methods')", str(folder / "grid.py"), "exec")
        with pytest.raises(ValueError) as caught:
            exec(code, {"__name__": "grid"})
        assert meant_for_users(caught.value, "__main__") is meant
        assert not meant_for_users(caught.value)
