"""`import skill_fairseq` imports only what registering needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_importing_the_package_imports_nothing_that_only_commands_need() -> None:
    code = (
        "import sys, fairseq; before = set(sys.modules); import skill_fairseq\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    heavy = "matplotlib transformers sklearn onnx onnxruntime s3prl sentencepiece torchaudio scipy"
    assert "'skill_fairseq'" in found
    assert not [name for name in heavy.split() if f"'{name}'" in found]


@pytest.mark.parametrize("asked", [False, True], ids=["encoder", "training"])
def test_a_broken_fairseq_is_in_the_way_of_training_alone(asked: bool, teacher_file: Path, tmp_path: Path) -> None:
    for name, content in (("fairseq", "raise ValueError('mutable default')"), ("fairseq_cli", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(content)
    code = "import skill_fairseq, sys; print(skill_fairseq.load_encoder(sys.argv[1]).num_parameters())"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", ("import fairseq_cli; " if asked else "") + code, str(teacher_file)]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    if asked:
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith("ImportError: fairseq is installed")
        assert "ValueError: mutable default" in last and "fairseq 0.12.2" in last
    else:
        assert int(result.stdout) > 10000 and not result.stderr
