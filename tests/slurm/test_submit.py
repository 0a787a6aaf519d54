"""examples/librispeech/submit.sh as far as possible without Slurm; run.sh beside this file tests the rest."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from messages import says
from runs import ENVIRONMENT, WORST

from skill_fairseq.checkpoints import load_encoder

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SUBMIT = EXAMPLES / "librispeech" / "submit.sh"
DATA, TEACHER = EXAMPLES / "tiny" / "data", EXAMPLES / "tiny" / "teacher" / "teacher.safetensors"
STEPS = ["cluster", "stage1", "stage2", "export"]


def submit(*options: object, script: Path = SUBMIT) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(["bash", str(script), *map(str, options)], capture_output=True, text=True, env=env)


def printed(out: Path, *options: object) -> dict[str, list[str]]:
    """The sbatch command of each step that is not done."""
    result = submit("--data", DATA, "--teacher", TEACHER, "--out", out, "--print", *options)
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    commands = [shlex.split(line) for line in result.stdout.splitlines() if line.startswith("sbatch ")]
    return {value(command, "--job-name")[len("skill-") :]: command for command in commands}


def value(command: list[str], option: str) -> str | None:
    """The value of the last such option, as in sbatch; None without it."""
    found = [word.split("=", 1)[1] for word in command if word.startswith(option + "=")]
    return found[-1] if found else None


def test_help_names_every_option() -> None:
    result = submit("--help")
    assert result.returncode == 0 and "set -euo" not in result.stdout
    script = SUBMIT.read_text(encoding="utf-8")
    options = set(re.findall(r"^        (--[a-z0-9-]+)\)", script, re.MULTILINE))
    assert len(options) == 17 and all(option in result.stdout for option in options)


def test_four_jobs_each_waiting_for_the_one_before(tmp_path: Path) -> None:
    commands = printed(tmp_path / "out")
    assert list(commands) == STEPS
    waits = [value(command, "--dependency") for command in commands.values()]
    assert waits == [None, "afterok:<cluster>", "afterok:<stage1>", "afterok:<stage2>"]
    for step, command in commands.items():
        assert {"--requeue", "--open-mode=append", "--kill-on-invalid-dep=yes"} <= set(command)
        assert value(command, "--output") == str(tmp_path / "out" / "logs" / f"{step}.log")
        assert value(command, "--signal") == ("USR1@180" if step.startswith("stage") else None)
    assert not (tmp_path / "out").exists()  # nothing was done


@pytest.mark.parametrize(
    ("run_config", "nodes", "tasks", "gpus"),
    [("cpu", "1", "1", None), ("slurm_1gpu", "1", "1", "1"), ("slurm_1node", "1", "4", "4")]
    + [("slurm_multinode", "2", "4", "4")],
)
def test_jobs_ask_for_what_the_run_config_says(tmp_path: Path, run_config, nodes, tasks, gpus) -> None:
    commands = printed(tmp_path, "--run-config", run_config)
    for step in ("stage1", "stage2"):
        found = [value(commands[step], option) for option in ("--nodes", "--ntasks-per-node", "--gpus-per-node")]
        assert found == [nodes, tasks, gpus]
        assert run_config in commands[step]
    assert value(commands["cluster"], "--gpus-per-node") == (gpus and "1")
    assert ("--device=cuda" in commands["cluster"]) == (gpus is not None)
    assert value(commands["export"], "--gpus-per-node") is None


def test_options_reach_the_steps_that_they_are_for(tmp_path: Path) -> None:
    options = ["--set", "a=1", "--set-stage1", "b=2", "--set-stage2", "c=3", "--cluster", "--max-seconds=9"]
    options += ["--sbatch", "--partition=gpu", "--sbatch-stage2", "--time=7"]
    commands = printed(tmp_path, *options)
    assert commands["stage1"][-2:] == ["a=1", "b=2"] and commands["stage2"][-2:] == ["a=1", "c=3"]
    assert commands["cluster"][-1] == "--max-seconds=9"
    assert {value(command, "--partition") for command in commands.values()} == {"gpu"}
    assert value(commands["stage2"], "--time") == "7" and value(commands["stage1"], "--time") == "1440"


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    """A folder without the marker of completion is not done."""
    (tmp_path / "clusters").mkdir()
    (tmp_path / "stage1").mkdir()
    commands = printed(tmp_path)
    assert list(commands) == STEPS[1:] and value(commands["stage1"], "--dependency") is None
    (tmp_path / "stage1" / "done").touch()
    commands = printed(tmp_path)
    assert list(commands) == STEPS[2:] and value(commands["stage2"], "--dependency") is None
    (tmp_path / "stage2").mkdir()
    (tmp_path / "stage2" / "done").touch()
    (tmp_path / "student.safetensors").touch()
    assert printed(tmp_path) == {}


def test_groups_that_are_there_need_no_clustering(tmp_path: Path) -> None:
    groups = tmp_path / "mine.yaml"
    groups.touch()
    commands = printed(tmp_path / "out", "--groups", groups)
    assert list(commands) == STEPS[1:] and str(groups) in commands["stage1"]
    assert "" in printed(tmp_path / "out", "--groups", "none")["stage1"]


def test_paths_are_handed_on_whatever_they_hold(tmp_path: Path) -> None:
    folder = tmp_path / WORST
    folder.mkdir()
    (folder / "clone").symlink_to(EXAMPLES.parent)
    (folder / "data").symlink_to(DATA)
    (folder / "teacher").symlink_to(TEACHER)
    script = folder / "clone" / "examples" / "librispeech" / "submit.sh"
    options = ["--data", folder / "data", "--teacher", folder / "teacher", "--out", folder / "out", "--print"]
    result = submit(*options, script=script)
    assert result.returncode == 0, result.stderr
    lines = [shlex.split(line) for line in result.stdout.splitlines() if line.startswith("sbatch ")]
    for command, step in zip(lines, STEPS):
        job = command[command.index(str(script.with_name("job.sh"))) :]
        assert job[1:3] == [step, str(folder / "out")]
        assert value(command, "--output") == f"{folder / 'out'}/logs/{step}.log".replace("%", "%%")  # Slurm's own sign
        if step != "export":
            assert job[3:5] == [str(folder / "data"), str(folder / "teacher")]
    for command, kind in zip(lines[1:3], ("distill", "final")):
        assert f"{folder / 'clone' / 'config' / kind / 'wavlm_base_plus_librispeech'}" in command
    result = submit(*options[:3], "${x}", *options[4:])
    assert result.returncode == 2 and "${" in result.stderr


def test_several_teachers(tmp_path: Path) -> None:
    """Each step gets all of them, with any paths; the first one as before."""
    folder = tmp_path / WORST
    folder.mkdir()
    for name in ("one, two", "second"):
        (folder / name).symlink_to(TEACHER)
    one, two = str(folder / "one, two"), str(folder / "second")
    options = ["--data", DATA, "--teacher", one, "--teacher", two, "--out", tmp_path / "out", "--print"]
    result = submit(*options)
    assert result.returncode == 0, result.stderr
    cluster, *stages = (shlex.split(line) for line in result.stdout.splitlines() if line.startswith("sbatch "))
    assert f"--teacher={two}" in cluster and one in cluster
    for command in stages[:2]:
        (word,) = (word for word in command if word.startswith("task.teacher="))
        assert OverridesParser.create().parse_override(word).value() == [one, two]


@pytest.mark.slow
def test_job_trains_under_any_path(tmp_path: Path, speech: Path, teacher_file: Path) -> None:
    """Clone, data, teacher and results, for both stages and the student."""
    folder = tmp_path / WORST
    folder.mkdir()
    (folder / "clone").symlink_to(EXAMPLES.parent)
    shutil.copytree(speech, folder / "data")
    shutil.copy(teacher_file, folder / "teacher.safetensors")
    (folder / "groups.yaml").write_text("groups: [[0], [1, 2], [3]]\n")
    (folder / "out").mkdir()
    script = folder / "clone" / "examples" / "librispeech" / "job.sh"
    where = [folder / "out", folder / "data", folder / "teacher.safetensors", "tiny", "cpu", folder / "groups.yaml"]
    few = ["optimization.max_update=4", "dataset.max_tokens=60000"]
    warmup = "lr_scheduler.warmup_updates=1"
    gates = [f"optimizer.groups.{group}.{warmup}" for group in ("default", "gates", "multipliers")]
    steps = [
        ["stage1", *where, *few, *gates, "criterion.sparsity_warmup=2"],
        ["stage2", *where, *few, warmup],
        ["export", folder / "out"],
    ]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {name: text for name, text in {**ENVIRONMENT, "PATH": path}.items() if name != "SLURM_JOB_ID"}
    for step in steps:
        done = subprocess.run(["bash", script, *map(str, step)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    config = yaml.safe_load((folder / "out" / "stage2" / ".hydra" / "config.yaml").read_text(encoding="utf-8"))
    assert config["task"]["data"] == str(folder / "data")
    assert config["model"]["init_from"] == f"{folder}/out/stage1/checkpoints/checkpoint_last.pt"
    student = load_encoder(folder / "out" / "student.safetensors")
    assert student.num_parameters() < load_encoder(teacher_file).num_parameters()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data"], ["--data: ", "value"]),
        (["--data", "absent", "--teacher", TEACHER, "--out", "x"], ["--data", "absent"]),
        (["--data", DATA, "--out", "x"], ["--teacher", "missing"]),
        (["--data", TEACHER.parent, "--teacher", TEACHER, "--out", "x"], ["train.tsv"]),
        (["--data", DATA, "--teacher", TEACHER, "--out", "x", "--config", "huge"], ["config/distill/huge.yaml"]),
        (["--data", DATA, "--teacher", TEACHER, "--out", "x", "--run-config", "moon"], ["moon.yaml", "cpu.yaml"]),
        (["--dta", DATA], ["--dta", "option"]),
    ],
)
def test_bad_options_are_named(options: list[object], said: list) -> None:
    result = submit(*options)
    assert result.returncode == 2
    assert re.search(says(*said), result.stderr) and result.stderr.count("\n") == 1


def test_job_outside_of_slurm_is_the_step_itself(tmp_path: Path) -> None:
    """Complete steps are skipped; a step that does not exist is an error."""
    job = ["bash", str(SUBMIT.with_name("job.sh"))]
    (tmp_path / "student.safetensors").write_bytes(b"there")
    assert subprocess.run([*job, "export", str(tmp_path)]).returncode == 0
    assert (tmp_path / "student.safetensors").read_bytes() == b"there"
    result = subprocess.run([*job, "stage3", str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 2 and re.search(says("stage3", "step"), result.stderr)


@pytest.mark.parametrize(
    ("end", "code"),
    [("exit 75", 75), ("kill -USR1 $$", 75), ("kill -USR2 $$", 75), ("exit 1", 1), ("kill -KILL $$", 137)],
)
def test_a_job_that_was_told_to_stop_goes_on_later(tmp_path: Path, end: str, code: int) -> None:
    """75 is the exit code of a training that was asked to stop; a signal's own code means that it had not started."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "fairseq-hydra-train"
    program.write_text(f"#!/usr/bin/env bash\n{end}\n")
    program.chmod(0o755)
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    env["PATH"] = f"{program.parent}{os.pathsep}{env['PATH']}"
    job = ["bash", str(SUBMIT.with_name("job.sh")), "stage1", str(tmp_path), str(DATA), str(TEACHER), "tiny", "cpu", ""]
    result = subprocess.run(job, env=env, capture_output=True, text=True)
    assert result.returncode == code
    assert ("same command" in result.stderr) == (code == 75)
