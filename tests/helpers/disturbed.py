"""Disturbed runs of ``fairseq-hydra-train``: starts, watches, signals and compares them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

import torch
from runs import CONFIG, ENVIRONMENT

from skill_fairseq.checkpoints.safe_load import load_torch_file

TRAIN = (str(Path(sys.executable).with_name("fairseq-hydra-train")),)
LOGGED = ["common.log_format=json", "common.log_interval=1"]
SETTINGS = [
    *LOGGED,
    "dataset.max_tokens=40000",
    "dataset.validate_interval_updates=0",
    "checkpoint.save_interval_updates=3",
    "checkpoint.keep_interval_updates=2",
    "criterion.groups=[[0],[1,2],[3]]",
    "criterion.target_sparsity=0.5",
    "criterion.sparsity_warmup=10",
    "optimization.max_update=40",
    "optimizer.groups.default.lr_scheduler.warmup_updates=5",
    "optimizer.groups.gates.lr_scheduler.warmup_updates=5",
    "optimizer.groups.multipliers.lr_scheduler.warmup_updates=5",
    "optimizer.groups.gates.lr_float=0.1",
    # All randomness is on: crops, dropout, gates.
    "task.max_sample_size=9000",
    "task.crop_multiple=1",
    "model.dropout=0.1",
    "model.attention_dropout=0.1",
    "+model.encoder_layerdrop=0.2",
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Run:
    """A training run in a folder, with one process or several; every :meth:`start` is the same command."""

    def __init__(
        self,
        folder: Path,
        *overrides: str,
        world_size: int = 1,
        program: tuple[str, ...] = TRAIN,
        config: tuple[str, str, list[str]] = ("distill", "tiny", SETTINGS),
    ) -> None:
        self.folder = folder
        self.world_size = world_size
        kind, name, settings = config
        self.command = [*program, "--config-dir", str(CONFIG / kind), "--config-name", name]
        self.command += ["hydra.run.dir=.", "checkpoint.save_dir=.", *settings, *overrides]
        if world_size > 1:
            self.command.append("distributed_training.distributed_backend=gloo")
        self.processes: list[subprocess.Popen] = []
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, **settings: Any) -> Run:
        port = str(free_port())
        for rank in range(self.world_size):
            environment = dict(ENVIRONMENT)
            if self.world_size > 1:
                place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(self.world_size)}
                environment.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
            with open(self.folder / f"log{rank}", "ab") as log:
                self.processes.append(
                    subprocess.Popen(
                        [*self.command, f"distributed_training.device_id={rank}"],
                        cwd=self.folder,
                        env=environment,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                        **settings,
                    )
                )
        return self

    def wait(self) -> list[int]:
        """Exit codes of all ranks."""
        codes = [process.wait(timeout=300) for process in self.processes]
        self.processes = []
        return codes

    def finish(self, **settings: Any) -> Run:
        assert self.start(**settings).wait() == [0] * self.world_size, self.log()[-5000:]
        return self

    def signal(self, number: int, ranks: Any = None) -> None:
        """Sends a signal to every process of the ranks, including data-loading workers, like Slurm."""
        for rank, process in enumerate(self.processes):
            if ranks is None or rank in ranks:
                os.killpg(process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait()

    def log(self, rank: int = 0) -> str:
        path = self.folder / f"log{rank}"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for(self, found: Callable[[], Any], seconds: float = 120) -> None:
        """Waits for a condition; fails if the run ends before."""
        end = time.monotonic() + seconds
        while not found():
            assert time.monotonic() < end, f"waited {seconds} s\n{self.log()[-3000:]}"
            assert all(process.poll() is None for process in self.processes), self.log()[-5000:]
            time.sleep(0.01)

    def updates(self) -> dict[int, dict[str, float]]:
        """The logged values of each update; checks that repeated updates are equal."""
        found: dict[int, dict[str, float]] = {}
        for line in re.findall(r"\[train_inner\]\[INFO\] - (\{.*\})", self.log()):
            entry = {k: float(v) for k, v in json.loads(line).items() if k not in CLOCKS}
            number = int(entry["num_updates"])
            assert found.setdefault(number, entry) == entry, f"update {number} was logged with other numbers before"
        return found

    def last_update(self) -> int:
        """The last logged one, from any start."""
        found = re.findall(r'"num_updates": "(\d+)"', self.log())
        return int(found[-1]) if found else 0

    def checkpoint(self, name: str = "checkpoint_last.pt") -> dict[str, Any]:
        return load_torch_file(self.folder / name)


CLOCKS = ("wall", "train_wall", "ups", "wps", "audio_s_per_s")


def same(one: Any, two: Any, where: str = "") -> None:
    """Compares bit for bit, through every dictionary and list."""
    assert type(one) is type(two), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype and torch.equal(one, two), where
    elif isinstance(one, dict):
        assert list(one) == list(two), where
        for key in one:
            same(one[key], two[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), where
        for index, pair in enumerate(zip(one, two)):
            same(*pair, f"{where}/{index}")
    else:
        assert one == two, where


def same_outcome(one: Run, two: Run) -> None:
    """Checks that two runs ended with the same weights, gates, multipliers, moments, schedules and data position."""
    first, second = one.checkpoint(), two.checkpoint()
    for part in ("model", "criterion", "last_optimizer_state"):
        same(first[part], second[part], part)
    same(first["optimizer_history"][-1], second["optimizer_history"][-1], "optimizer_history")
    same(first["extra_state"]["train_iterator"], second["extra_state"]["train_iterator"], "train_iterator")
    assert one.updates() == two.updates()
