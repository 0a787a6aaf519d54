"""Shared by the tests of the start-up hook: its file, and new Pythons to start it in."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
HOOK_FOLDER = REPO / "skill_fairseq" / "hook"
START = f"import sys; sys.path.insert(0, {str(HOOK_FOLDER)!r})\nimport _skill_fairseq_hook as hook; hook.install()\n"

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def python(tmp_path: Path) -> Run:
    """Runs code in a new Python, in ``tmp_path``, with the hook started (or ``SKILL_FAIRSEQ_HOOK=0``)."""

    def run(code: str, hook: bool = True, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        script = tmp_path / "script.py"
        script.write_text(START + code)
        env = {k: v for k, v in os.environ.items() if not k.startswith("SKILL_FAIRSEQ")}
        env.update(SKILL_FAIRSEQ_HOOK=str(int(hook)), PYTHONPATH=f"{REPO}{os.pathsep}{HOOK_FOLDER}")
        return subprocess.run(
            [sys.executable, *flags, str(script)], cwd=tmp_path, env=env, capture_output=True, text=True
        )

    return run
