"""The start-up hook as a whole: when it is active, when it does nothing, and where it finds the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from runs import ENVIRONMENT, WORST

from skill_fairseq import __file__ as package_file

USER_DIR = os.path.dirname(package_file)
IS_ON = "print(hook.Finder in sys.meta_path, hook.Finder.started)\n"


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
    """An environment with that version's files, or with a package without metadata."""
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


USER_DIRS = """
import os
import subprocess
from omegaconf import OmegaConf
print('skill_fairseq' in sys.modules)
for name in 'SKILL_FAIRSEQ_USER_DIR', 'UNSET_VARIABLE':
    print(OmegaConf.create({'dir': '${env:%s,skill_fairseq}' % name}).dir)
"""


def test_user_dir_is_the_package_found_not_imported(python):
    result = python(USER_DIRS)
    assert result.stdout == f"False\n{USER_DIR}\nskill_fairseq\n", result.stderr


def test_user_dir_that_the_user_has_set_wins(python):
    result = python("import os\nos.environ['SKILL_FAIRSEQ_USER_DIR'] = '/somewhere/else'\n" + USER_DIRS)
    assert result.stdout == "False\n/somewhere/else\nskill_fairseq\n", result.stderr


def test_user_dir_that_the_hook_of_a_parent_has_set_does_not(python):
    """As if a program of one environment starts one of another, with its own skill_fairseq."""
    inherited = "import os\nos.environ['SKILL_FAIRSEQ_USER_DIR'] = os.environ[hook.FOUND] = '/another/environment'\n"
    result = python(inherited + USER_DIRS)
    assert result.stdout == f"False\n{USER_DIR}\nskill_fairseq\n", result.stderr


@pytest.mark.parametrize("patches", ["BEFORE", "AFTER"])
def test_a_patch_that_fails_breaks_no_import(python, patches):
    """Each patch in turn, before and after an import, with all others active."""
    result = python(
        f"""
def failing(*args):
    raise RuntimeError("this patch fails")

if {patches!r} == "BEFORE":
    hook.BEFORE = (failing, *hook.BEFORE, failing)
else:
    hook.AFTER = {{name: (failing, *patches) for name, patches in hook.AFTER.items()}}
import hydra._internal.utils
import omegaconf
print(hydra.__version__, hydra._internal.utils.print_exception.__module__)
"""
    )
    assert result.stdout == "1.0.7 _skill_fairseq_hook\n", result.stderr
    said = "skill_fairseq's start-up hook: failing failed (RuntimeError: this patch fails)"
    assert result.stderr.count(said) == (2 if patches == "BEFORE" else 1) and "SKILL_FAIRSEQ_HOOK=0" in result.stderr


PROGRAM = """
import os
from importlib.util import find_spec
import hydra

@hydra.main(config_path={config_path!r}, config_name="mine")
def program(cfg):
    cfg, launcher = dict(cfg), dict(hydra.core.hydra_config.HydraConfig.get().launcher)
    print(cfg.get("run"), cfg.get("distributed_training"), launcher.get("nodes"), launcher["_target_"].split(".")[-1])

sys.argv = ["program", *{arguments!r}]
program()
"""
FAIRSEQ = os.path.join(os.path.dirname(str(find_spec("fairseq").origin)), "config")


@pytest.fixture
def started(python, tmp_path):
    """A hydra program in ``tmp_path``, with fairseq's config folder or another one."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "mine.yaml").write_text("# @package _group_\ncommon: {seed: 1}\n")

    def start(*arguments: str, config_path: str = FAIRSEQ) -> subprocess.CompletedProcess[str]:
        return python(PROGRAM.format(config_path=config_path, arguments=[*arguments, "hydra.run.dir=made"]))

    return start


BESIDE = ("--config-dir", "elsewhere")


def test_run_configs_are_found_beside_a_foreign_config_dir(started):
    """With the basic launcher, which has no such options, and with submitit's."""
    result = started(*BESIDE, "+run=slurm_1gpu")
    assert result.stdout == "None {'distributed_world_size': 1} 1 BasicLauncher\n", result.stderr
    result = started(*BESIDE, "+run=slurm_multinode", "hydra/launcher=submitit_slurm")
    expected = "None {'distributed_world_size': 8, 'distributed_port': 29500} 2 SlurmLauncher\n"
    assert result.stdout == expected, result.stderr


def test_run_config_of_the_foreign_folder_comes_first(started, tmp_path):
    own = tmp_path / "elsewhere" / "run" / "slurm_1gpu.yaml"
    own.parent.mkdir()
    own.write_text("# @package _global_\ndistributed_training: theirs\n")
    result = started(*BESIDE, "+run=slurm_1gpu")
    assert result.stdout == "None theirs None BasicLauncher\n", result.stderr


def test_run_config_that_is_nowhere_is_named_with_those_that_are_there(started):
    error = started(*BESIDE, "+run=absent").stderr
    assert "Could not load run/absent" in error
    assert all(name in error for name in ("cpu", "slurm_1gpu", "slurm_1node", "slurm_multinode"))


@pytest.mark.parametrize("program", ["fairseq's", "a stranger's"])
@pytest.mark.parametrize("folder", ["config/distill", "config", "absent"])
def test_a_config_dir_that_is_not_there_is_an_error(started, folder, program):
    """Also if skill_fairseq has one with the same name."""
    result = started("--config-dir", folder, config_path=FAIRSEQ if program == "fairseq's" else "elsewhere")
    assert result.returncode == 1 and result.stdout == ""
    assert "Additional config directory" in result.stderr and f"{folder}' not found" in result.stderr


def test_other_programs_of_hydra_are_as_without_the_hook(started):
    """Their +run means their own key, their search path has no folder of ours, and their launcher keeps its schema."""
    result = started("+run=slurm_1gpu", config_path="elsewhere")
    assert result.stdout == "slurm_1gpu None None BasicLauncher\n", result.stderr
    result = started("hydra.launcher.nodes=1", config_path="elsewhere")
    assert result.returncode == 1 and "Key 'nodes' not in 'BasicLauncherConf'" in result.stderr
    shown = started("--info", config_path="elsewhere").stdout
    ours = [os.path.join(parent, "config") for parent in (USER_DIR, os.path.dirname(USER_DIR))]
    assert "elsewhere" in shown and not any(f"file://{folder} " in shown for folder in ours)


def quoted(python, words: list[str], multirun: bool = False) -> list[str]:
    result = python(f"import hydra, json\nprint(json.dumps([hook.quote_path(w, {multirun}) for w in {words!r}]))\n")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_any_path_in_an_override_is_the_path_that_hydra_reads(python, tmp_path):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (tmp_path / "a\\(b").mkdir()  # hydra would read it as a(b
    names = [WORST, "j\u00f6rg", "it's", "a,b", "a=b", "C#", "Kim (2024)", "ends\\", "\\'", "x ", "{a: b}", "plain"]
    paths = [f"/data/{name}" for name in names] + [f"{tmp_path}/a\\(b", "data/j\u00f6rg"]
    words = quoted(python, [f"task.data={path}" for path in paths])
    found = OverridesParser.create().parse_overrides(words)
    assert [each.value() for each in found] == paths and not any(each.is_sweep_override() for each in found)
    assert words[names.index("plain")] == "task.data=/data/plain"


def test_overrides_that_are_no_paths_stay_as_they_are(python, tmp_path):
    """Also overrides that hydra refuses, and commas between the runs of a sweep."""
    (tmp_path / "true").touch()
    words = ["common.cpu=true", "+run=cpu", "criterion.groups=[[0],[1,2]", "a=1,2", "a=choice(/x,/y)", "a='/x,y'"]
    words += ["a={b:1}", "optimizer.adam_betas=(0.9,0.98)", "~task", "--config-dir=/a=b", "x="]
    assert quoted(python, words) == words
    assert quoted(python, ["a=/x,/y", "a=/\u00fc"], multirun=True) == ["a=/x,/y", "a='/\u00fc'"]
    assert quoted(python, ["a=/x,/y"]) == ["a='/x,/y'"]


def test_fairseq_hydra_train_takes_any_path(tmp_path):
    """As in the README; the word after --config-dir is not an override."""
    folder = tmp_path / "a=b" / WORST
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("# @package _group_\ntask:\n  data: ???\n")
    command = [str(Path(sys.executable).with_name("fairseq-hydra-train")), "--config-dir", os.path.join("a=b", WORST)]
    command += ["--config-name", "mine", f"task.data={folder}", "--cfg", "job"]
    result = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert yaml.safe_load(result.stdout)["task"]["data"] == str(folder)
