"""``pip install .`` and ``pip install -e .`` of a copy of this project, each in a new environment."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]
CONFIG = """# @package _group_
common:
  user_dir: ${env:SKILL_FAIRSEQ_USER_DIR,skill_fairseq}
task:
  _name: audio_pretraining
  data: nowhere
model:
  _name: wav2vec2
"""


def run(*command: object, **kwargs) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, **kwargs)


class Environment:
    """A virtual environment that sees the packages of this one and has a copy of this project installed."""

    def __init__(self, folder: Path, editable: bool) -> None:
        self.editable = editable
        self.project = folder / "project"
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "skill_fairseq", "config"):
            copy = shutil.copytree if (REPO / name).is_dir() else shutil.copy
            (self.project / name).parent.mkdir(parents=True, exist_ok=True)
            copy(REPO / name, self.project / name)
        # Shows an import of the package; without a batch size fairseq stops right after importing the user dir.
        with open(self.project / "skill_fairseq" / "__init__.py", "a") as module:
            module.write("\nimport os\n\nprint('imported:', __file__, 'in', os.getcwd(), flush=True)\n")
        (self.project / "config" / "install").mkdir()
        (self.project / "config" / "install" / "probe.yaml").write_text(CONFIG)

        self.python = folder / "env" / "bin" / "python"
        assert run(sys.executable, "-m", "venv", "--without-pip", folder / "env").returncode == 0
        out = run(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout
        self.site = Path(out.strip())
        outer = {sysconfig.get_path("purelib"), *site.getsitepackages()}
        (self.site / "0_outer.pth").write_text("".join(f"{path}\n" for path in sorted(outer)))
        self.before = self.files()
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "SKILL_FAIRSEQ"))}
        self.env.update(PIP_NO_DEPS="1", PIP_NO_INDEX="1", PIP_DISABLE_PIP_VERSION_CHECK="1")
        self.pip("install", "--no-build-isolation", *(["-e"] if editable else []), self.project)

    def pip(self, *arguments: object) -> str:
        result = run(sys.executable, "-m", "pip", "--python", self.python, *arguments, env=self.env)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def files(self) -> set[str]:
        return {path.name for path in self.site.iterdir() if path.name != "__pycache__"}


@pytest.fixture(scope="module", params=[False, True], ids=["wheel", "editable"])
def environment(request, tmp_path_factory) -> Environment:
    return Environment(tmp_path_factory.mktemp("install"), editable=request.param)


def test_hook_is_at_the_top_beside_its_pth_and_the_checkout_is_left_clean(environment):
    new = environment.files() - environment.before
    assert "skill_fairseq_hook.pth" in new
    assert ("_skill_fairseq_hook.py" in new) != environment.editable  # editable: the checkout's own file
    code = "import sys, _skill_fairseq_hook as hook; print(hook.__file__, hook.Finder in sys.meta_path)"
    result = run(environment.python, "-c", code, env=environment.env, cwd="/")
    folder = environment.project / "skill_fairseq" / "hook" if environment.editable else environment.site
    assert result.stdout == f"{folder / '_skill_fairseq_hook.py'} True\n", result.stderr
    assert not list(environment.project.rglob("*.egg-info")) + list(environment.project.rglob("build"))


def test_configs_are_within_reach(environment):
    configs = environment.project / "config"
    if not environment.editable:
        configs = environment.site / "skill_fairseq" / "config"
    shown = {path.relative_to(configs) for path in configs.rglob("*.yaml")}
    assert shown == {path.relative_to(REPO / "config") for path in (REPO / "config").rglob("*.yaml")} | {
        Path("install/probe.yaml")
    }


def test_fairseq_hydra_train_from_a_foreign_folder(environment, tmp_path):
    """User dir, run configs and patches work in the working directory that hydra creates."""
    script = shutil.which("fairseq-hydra-train", path=os.path.dirname(sys.executable))
    configs = environment.project / "config" / "install"
    command = ["--config-dir", str(configs), "--config-name", "probe", "hydra.run.dir=made", "+run=cpu"]
    result = run(environment.python, script, *command, cwd=tmp_path, env=environment.env)
    package = (environment.project if environment.editable else environment.site) / "skill_fairseq"
    assert f"imported: {package / '__init__.py'} in {tmp_path / 'made'}\n" in result.stdout, result.stderr
    assert "AssertionError: Must specify batch size" in result.stderr
    config = yaml.safe_load((tmp_path / "made" / ".hydra" / "config.yaml").read_text())
    assert config["common"]["cpu"] is True and config["distributed_training"]["distributed_world_size"] == 1


def test_uninstall_leaves_nothing(environment):
    environment.pip("uninstall", "-y", "skill_fairseq")
    assert environment.files() == environment.before
    assert not list(environment.python.parent.glob("skill-*"))


@pytest.mark.slow  # fetches a pip
@pytest.mark.parametrize(("pip", "refused"), [("24.0", False), ("24.1", True)])
def test_pip_that_rejects_omegaconf_is_refused_in_one_line(tmp_path, pip, refused):
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", tmp_path, f"pip=={pip}", check=True)
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "PIP_NO_DEPS": "0"}
    command = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path / "wheels", REPO]
    result = run(sys.executable, "-m", "pip", *command, env=env)
    line = f"skill_fairseq: pip {pip} cannot install omegaconf 2.0.6"
    assert (result.returncode != 0) == refused, result.stderr
    assert sum(line in text for text in result.stderr.splitlines()) == int(refused)
    assert "Traceback" not in result.stderr
