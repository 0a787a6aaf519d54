"""Runs of fairseq-hydra-train with the tiny configs, and their logs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import skill_fairseq

CONFIG = Path(__file__).resolve().parents[2] / "config"
WORST = 'J\u00fcrgen\'s "runs" (a=b), [1] {c} @#~$HOME & 50%'
"""A name of a folder that a file system takes, and that shells, hydra's grammar and file patterns have meanings for."""
ENVIRONMENT = {
    **os.environ,
    "SKILL_FAIRSEQ_USER_DIR": str(Path(skill_fairseq.__file__).parent),
    "PYTHONPATH": os.pathsep.join([str(CONFIG.parent), os.environ.get("PYTHONPATH", "")]),
    "OMP_NUM_THREADS": "1",
}


def run(command: list[str], folder: Path, fails: bool = False) -> str:
    """The command's output; checks that it succeeds, or fails."""
    folder.mkdir(parents=True, exist_ok=True)
    result = subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600
    )
    assert (result.returncode != 0) == fails, result.stdout[-5000:]
    return result.stdout


def train(
    folder: Path, config: str, *overrides: str, launcher: tuple = (), fails: bool = False, name: str = "tiny"
) -> str:
    """The log of ``fairseq-hydra-train`` with a config, in a folder that also gets its checkpoints."""
    command = launcher or (str(Path(sys.executable).with_name("fairseq-hydra-train")),)
    where = ["--config-dir", str(CONFIG / config), "--config-name", name, "hydra.run.dir=.", "checkpoint.save_dir=."]
    return run([*command, *where, *overrides], folder, fails)


def script(folder: Path, source: str, processes: int = 1) -> tuple:
    """A launcher for :func:`train`: this Python script instead of ``fairseq-hydra-train``, with torchrun."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "script.py").write_text(source)
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
    return (sys.executable, *torchrun, "script.py")


def logged(log: str, kind: str) -> list[dict[str, float]]:
    """The entries logged as "train_inner" or "valid", one dictionary each."""
    entries = []
    for line in re.findall(rf"\[{kind}\]\[INFO\] - (\{{.*\}})", log):
        fields = {name.replace("valid_", ""): value for name, value in json.loads(line).items()}
        entries.append({name: float(value) for name, value in fields.items() if name != "epoch"})
    return entries
