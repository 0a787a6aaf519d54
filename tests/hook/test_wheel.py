"""`python -m build`, its wheel in a clean environment, and inference where only torch, numpy and safetensors are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Optional

import pytest
from packaging.requirements import Requirement

REPO = Path(__file__).resolve().parents[2]
FORWARD = """
import sys, torch, skill_fairseq
encoder = skill_fairseq.load_encoder(sys.argv[1])
states, lengths = encoder.features([torch.randn(16000), torch.randn(8000)], sampling_rate=16000, layers=[1])
print(skill_fairseq.__file__, lengths.tolist(), states[0].shape[-1], "fairseq" in sys.modules)
"""


def run(*command: object, **kwargs: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **kwargs)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return str(done.stdout)


def needed_by(*names: str) -> set[str]:
    """Packages of this environment that these need, themselves among them."""
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        try:
            requires = [] if name in found else distribution(name).requires or []
        except PackageNotFoundError:  # for another system
            continue
        found.add(name)
        wanted = map(Requirement, requires)
        todo += [r.name for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


class Environment:
    """A virtual environment with links to packages of this one, all of them where none is named."""

    def __init__(self, folder: Path, packages: Optional[set[str]] = None) -> None:
        run(sys.executable, "-m", "venv", "--without-pip", folder)
        self.bin = folder / "bin"
        self.python = self.bin / "python"
        self.site = Path(run(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "SKILL_FAIRSEQ"))}
        self.env.update(
            PATH=f"{self.bin}{os.pathsep}{os.environ['PATH']}", PIP_NO_INDEX="1", PIP_NO_BUILD_ISOLATION="0"
        )
        pip = f'#!/bin/sh\nexec {sys.executable} -m pip --python {self.python} "$@"\n'
        (self.bin / "pip").write_text(pip)
        (self.bin / "pip").chmod(0o755)
        if packages is None:
            outer = [path for path in sys.path if Path(path).name == "site-packages"]
            (self.site / "0_outer.pth").write_text("".join(f"{path}\n" for path in outer))
        for name in packages or ():
            found = distribution(name)
            for part in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
                if not (self.site / part).exists():
                    (self.site / part).symlink_to(found.locate_file(part))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the sdist, as `python -m build` makes both."""
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("dist")
    before = run("git", "-C", REPO, "status", "--porcelain")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, REPO)
    assert run("git", "-C", REPO, "status", "--porcelain") == before
    (sdist,) = out.glob("*.tar.gz")
    (found,) = out.glob("*-py3-none-any.whl")
    assert sdist.name.startswith("skill_fairseq-")
    return found


@pytest.mark.nightly
def test_the_wheel_has_commands_encoder_and_configs(wheel: Path, teacher_file: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "env")
    run(environment.bin / "pip", "install", "--no-deps", "--ignore-installed", wheel, env=environment.env)
    options = {"cwd": tmp_path, "env": environment.env}
    package = environment.site / "skill_fairseq"
    found = run(environment.python, "-c", FORWARD, teacher_file, **options)
    assert found == f"{package / '__init__.py'} [49, 24] 32 True\n"
    commands = {path.stem for path in (REPO / "skill_fairseq" / "cli").glob("[a-z]*.py")}
    assert {script.name for script in environment.bin.glob("skill-*")} == {f"skill-{name}" for name in commands}
    assert "convolutions" in run(environment.bin / "skill-info", teacher_file, **options)
    configs = {path.relative_to(package / "config") for path in (package / "config").rglob("*.yaml")}
    assert configs == {path.relative_to(REPO / "config") for path in (REPO / "config").rglob("*.yaml")}


@pytest.mark.nightly
def test_inference_needs_torch_numpy_and_safetensors_alone(teacher_file: Path, tmp_path: Path) -> None:
    """By the lines of the page, in an environment that has nothing else, but for what builds a wheel."""
    page = (REPO / "skill_fairseq" / "API.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"(?ms)^```bash\n(pip install .*?)^```$", page)
    environment = Environment(tmp_path / "env", needed_by("torch", "numpy", "safetensors", "setuptools", "wheel"))
    for name in ("fairseq", "scipy", "soundfile", "omegaconf", "yaml", "tqdm"):
        with pytest.raises(AssertionError, match="ModuleNotFoundError"):
            run(environment.python, "-c", f"import {name}", env=environment.env)
    said = run("bash", "-ec", block, cwd=REPO, env=environment.env)
    assert "Successfully installed skill_fairseq" in said or "Successfully installed skill-fairseq" in said
    options = {"cwd": tmp_path, "env": environment.env}
    found = run(environment.python, "-c", FORWARD, teacher_file, **options)
    assert found == f"{environment.site / 'skill_fairseq' / '__init__.py'} [49, 24] 32 False\n"
    assert "convolutions" in run(environment.bin / "skill-info", teacher_file, **options)
