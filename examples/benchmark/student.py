"""Makes a student of the benchmark with the commands that a user would run."""

from __future__ import annotations

import contextlib
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

# beside this file
from budget import cost_of
from grid import Grid, Run

from skill_fairseq import load_encoder
from skill_fairseq.checkpoints.export import save_encoder
from skill_fairseq.checkpoints.load import read_source
from skill_fairseq.cli import export, shrink
from skill_fairseq.clustering.config_file import format_groups
from skill_fairseq.files import read_json, write_json
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.pruning.costs import make_cost
from skill_fairseq.pruning.magnitude import prune_by_magnitude

GATED = ["conv", "heads", "ffn"]
"""Units that layer-group methods prune."""


def call(command: Sequence[str], log: Path) -> int:
    """Runs a command and appends its output to a log; passes on signals to stop. Returns its exit code."""
    with open(log, "a", encoding="utf-8") as stream:
        child = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        try:
            return child.wait()
        except BaseException:
            child.terminate()
            child.wait()
            raise


def in_log(main: Any, arguments: Sequence[str], log: Path) -> None:
    """Runs one of our commands in this process and appends its output to a log.

    Raises:
        ValueError: it failed.
    """
    with (
        open(log, "a", encoding="utf-8") as stream,
        contextlib.redirect_stdout(stream),
        contextlib.redirect_stderr(stream),
    ):
        code = main(list(arguments))
    if code:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1]
        raise ValueError(f"{' '.join(arguments)}: {last}; all output is in {log}")


def train(folder: Path, config: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Runs a stage with fairseq-hydra-train, unless done already; resumes from its last checkpoint.

    Args:
        folder: run directory of the stage.
        config: YAML file without its suffix.
        overrides: overrides of the config's fields.

    Returns:
        ``seconds`` of wall time and ``cpu_seconds`` of all its processes, over all attempts, and the number of
        attempts.

    Raises:
        ValueError: training failed; names the log.
    """
    done, spent = folder / "done", folder / "attempts.json"
    if done.is_file():
        return dict(read_json(done))
    folder.mkdir(parents=True, exist_ok=True)
    executable = Path(sys.executable).with_name("fairseq-hydra-train")
    command = str(executable) if executable.is_file() else shutil.which("fairseq-hydra-train")
    if command is None:
        raise ValueError("fairseq-hydra-train: not found; install skill_fairseq in this Python: pip install '.[probe]'")
    seconds = read_json(spent) if spent.is_file() else []
    began, used = time.monotonic(), _children_seconds()
    try:
        code = call(
            [
                *(command, "--config-dir", str(config.parent), "--config-name", config.name),
                *overrides,
                f"hydra.run.dir={folder}",
                f"checkpoint.save_dir={folder}",
            ],
            folder / "log",
        )
    finally:
        seconds.append([time.monotonic() - began, _children_seconds() - used])
        write_json(spent, seconds)
    if code:
        lines = (folder / "log").read_text(encoding="utf-8").splitlines()
        why = next((line for line in reversed(lines) if "Error" in line), f"exit code {code}")
        raise ValueError(f"{folder.name}: training failed: {why.strip()} (all output is in {folder / 'log'})")
    wall, cpu = map(sum, zip(*seconds))
    record = {"seconds": wall, "cpu_seconds": cpu, "attempts": len(seconds)}
    write_json(done, record)
    return record


def _children_seconds() -> float:
    """Processor time of all finished child processes; wall time says little on a shared machine."""
    found = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found.ru_utime + found.ru_stime


def common_overrides(run: Run, grid: Grid, teacher: SpeechEncoder) -> list[str]:
    """Overrides of every training of a run."""
    return [
        f"task.data={grid.data}",
        f"task.teacher={grid.teacher}",
        f"task.normalize={str(bool(teacher.normalize)).lower()}",
        f"common.seed={run.seed}",
    ]


def filled(run: Run, folder: Path) -> list[str]:
    """A variant's overrides of stage 1, with $left (share of the cost to keep) and $out (the comparison's folder)."""
    values = {"left": f"{1 - run.sparsity:.6g}", "out": str(folder.parent.parent)}
    return [Template(override).safe_substitute(values) for override in run.target.stage1]


def make_student(run: Run, grid: Grid, folder: Path, configs: Path) -> dict[str, Any]:
    """Makes student.safetensors in the run's folder: stage 1, shrink, stage 2, export; or one-shot pruning.

    Args:
        run, grid: the student to make.
        folder: the run's folder; finished steps are not repeated.
        configs: folder that the stages' configs are relative to.

    Returns:
        wall times, processor time of training, and sparsities.
    """
    student, shrunk, log = folder / "student.safetensors", folder / "shrunk.safetensors", folder / "log"
    teacher = load_encoder(grid.teacher)
    if run.target.groups is None:
        began, cost = time.monotonic(), make_cost(grid.budget)
        small = prune_by_magnitude(teacher, run.sparsity, GATED, cost)
        actual = 1 - cost_of(small.config, cost) / cost.original(teacher.config)
        save_encoder(small, student, {"method": run.method, "source": grid.teacher.name})
        return {
            "sparsity": {"asked": run.sparsity, "expected": None, "actual": actual},
            "seconds": {"prune": time.monotonic() - began},
            "cpu_seconds": 0.0,
        }
    common = [
        *common_overrides(run, grid, teacher),
        f"criterion.groups={format_groups(run.target.groups, ',')}",
        f"criterion.projection_sharing={str(run.target.projection_sharing).replace(' ', '')}",
    ]
    stage1 = train(
        folder / "stage1",
        configs / grid.stage1["config"],
        [*grid.overrides("stage1"), *common, f"criterion.target_sparsity={run.sparsity}", *filled(run, folder)],
    )
    checkpoint = folder / "stage1" / "checkpoint_last.pt"
    if not shrunk.is_file():
        in_log(shrink.main, [str(checkpoint), str(shrunk)], log)
    stage2 = train(
        folder / "stage2",
        configs / grid.stage2["config"],
        [*grid.overrides("stage2"), *common, f"model.init_from={checkpoint}", *run.target.stage2],
    )
    if not student.is_file():
        in_log(export.main, [str(folder / "stage2" / "checkpoint_last.pt"), str(student)], log)
    return {
        "sparsity": dict(read_source(shrunk).provenance["sparsity"]),
        "seconds": {"stage1": stage1["seconds"], "stage2": stage2["seconds"]},
        "cpu_seconds": stage1["cpu_seconds"] + stage2["cpu_seconds"],
        "attempts": {"stage1": stage1["attempts"], "stage2": stage2["attempts"]},
    }
