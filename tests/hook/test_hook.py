"""The start-up hook as a whole: when it works, when it steps aside, and where it finds the package."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from skill_fairseq import __file__ as package_file

USER_DIR = os.path.dirname(package_file)
IS_ON = "print(hook.Finder in sys.meta_path, hook.Finder.started)\n"


@pytest.fixture
def config_dir(python, tmp_path):
    """What hydra makes of ``--config-dir``, read in ``tmp_path``."""

    def parse(path: str) -> str:
        result = python(
            f"from hydra._internal.utils import get_args\nprint(get_args(['--config-dir', {path!r}]).config_dir)\n"
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    return parse


def test_start_imports_nothing():
    hook_folder = os.path.join(USER_DIR, "hook")
    code = (
        f"import sys; sys.path.insert(0, {hook_folder!r}); before = set(sys.modules)\n"
        "import _skill_fairseq_hook; _skill_fairseq_hook.install()\n"
        "print(sorted(set(sys.modules) - before - {'__future__', '_skill_fairseq_hook'}))\n"
    )
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr


def test_waits_for_the_first_of_its_packages(python):
    result = python("import dataclasses, json, numpy\n" + IS_ON + "import omegaconf\n" + IS_ON)
    assert result.stdout == "True False\nTrue True\n", result.stderr


def test_starting_twice_is_starting_once(python):
    result = python("hook.install()\nprint(sys.meta_path.count(hook.Finder))\n")
    assert result.stdout == "1\n", result.stderr


def test_switched_off_by_environment(python):
    result = python(IS_ON + "import os, omegaconf\nprint(os.environ.get('SKILL_FAIRSEQ_USER_DIR'))\n", hook=False)
    assert result.stdout == "False False\nNone\n", result.stderr


@pytest.mark.parametrize("version", ["2.1.0", "2.3.0", None])
def test_steps_aside_from_another_omegaconf(python, tmp_path, version):
    """An environment with the files of that version, or with a package that has no metadata at all."""
    other = tmp_path / "site"
    (other / "omegaconf").mkdir(parents=True)
    (other / "omegaconf" / "__init__.py").write_text("")
    if version:
        info = other / f"omegaconf-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: omegaconf\nVersion: {version}\n")
    result = python(
        f"import dataclasses\nplain = vars(dataclasses).copy()\nsys.path.insert(0, {str(other)!r})\n"
        + "import omegaconf\n"
        + IS_ON
        + "import os\nprint(vars(dataclasses) == plain, 'SKILL_FAIRSEQ_USER_DIR' in os.environ)\n",
        flags=() if version else ("-S",),  # -S: no site-packages, so nothing counts as installed
    )
    assert result.stdout == "False True\nTrue False\n", result.stderr


def test_user_dir_is_the_package_found_not_imported_and_what_was_set_is_replaced(python):
    result = python(
        "import os\n"
        "os.environ['SKILL_FAIRSEQ_USER_DIR'] = '/somewhere/else'\n"
        "from omegaconf import OmegaConf\n"
        "print('skill_fairseq' in sys.modules)\n"
        "for name in 'SKILL_FAIRSEQ_USER_DIR', 'UNSET_VARIABLE':\n"
        "    print(OmegaConf.create({'dir': '${env:%s,skill_fairseq}' % name}).dir)\n"
    )
    assert result.stdout == f"False\n{USER_DIR}\nskill_fairseq\n", result.stderr


def test_config_dir_of_the_working_directory_comes_first(config_dir, tmp_path):
    (tmp_path / "config" / "pretrain").mkdir(parents=True)
    assert config_dir("config/pretrain") == "config/pretrain"


def test_config_dir_is_found_in_the_package(config_dir):
    found = config_dir("config/pretrain")
    assert os.path.isabs(found) and os.path.isdir(found)
    assert os.path.dirname(os.path.dirname(found)) in (USER_DIR, os.path.dirname(USER_DIR))


@pytest.mark.parametrize("path", ["config/absent", "/absent/config"])
def test_config_dir_found_nowhere_stays_for_hydra_to_name(config_dir, path):
    assert config_dir(path) == path


COMPOSE = """
from hydra.experimental import compose, initialize_config_dir
with initialize_config_dir({folder!r}):
    cfg = dict(compose("mine", overrides={overrides!r}, return_hydra_config=True))
launcher = dict(cfg["hydra"].launcher)
print(cfg.get("run"), cfg.get("distributed_training"), launcher.get("nodes"), launcher["_target_"].split(".")[-1])
"""


@pytest.fixture
def composed(python, tmp_path):
    """What a config of the folder ``tmp_path / "elsewhere"`` becomes with overrides."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "mine.yaml").write_text("# @package _group_\ncommon: {seed: 1}\n")

    def compose(*overrides: str, before: str = "") -> subprocess.CompletedProcess[str]:
        return python(before + COMPOSE.format(folder=str(folder), overrides=list(overrides)))

    return compose


def test_run_configs_are_found_beside_a_foreign_config_dir(composed):
    """By the launcher of a plain run, which has no such options, and by submitit's."""
    result = composed("+run=slurm_1gpu")
    assert result.stdout == "None {'distributed_world_size': 1} 1 BasicLauncher\n", result.stderr
    result = composed("+run=slurm_multinode", "hydra/launcher=submitit_slurm")
    expected = "None {'distributed_world_size': 8, 'distributed_port': 29500} 2 SlurmLauncher\n"
    assert result.stdout == expected, result.stderr


def test_run_config_is_a_mere_word_without_the_patch(composed):
    result = composed("+run=slurm_1gpu", before="del hook.AFTER['hydra._internal.hydra']\n")
    assert result.stdout == "slurm_1gpu None None BasicLauncher\n", result.stderr


def test_run_config_of_the_foreign_folder_comes_first(composed, tmp_path):
    own = tmp_path / "elsewhere" / "run" / "slurm_1gpu.yaml"
    own.parent.mkdir()
    own.write_text("# @package _global_\ndistributed_training: theirs\n")
    result = composed("+run=slurm_1gpu")
    assert result.stdout == "None theirs None BasicLauncher\n", result.stderr


def test_run_config_that_is_nowhere_is_named_with_those_that_are_there(composed):
    error = composed("+run=absent").stderr
    assert "Could not load run/absent" in error
    assert all(name in error for name in ("cpu", "slurm_1gpu", "slurm_1node", "slurm_multinode"))
