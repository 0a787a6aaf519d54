"""Signals before a job's end: the update is finished, the checkpoint written, and the exit code gives the reason."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from disturbed import LOGGED, Run, same_outcome
from runs import ENVIRONMENT

from skill_fairseq.audio.manifest import read_manifest, write_manifest
from skill_fairseq.training.preemption import REQUEUE_EXIT_CODE, SIGNALS, Preemption


@pytest.mark.faults(
    "SIGTERM, SIGUSR1 or SIGUSR2: preemption, the end of the time limit",
    "the update is finished and a checkpoint written; exit code 75 on every rank; no update is lost",
)
@pytest.mark.nightly
def test_signals_to_every_process_lose_no_update(data: list[str], straight: Any, tmp_path: Path) -> None:
    """As sent by Slurm."""
    run = Run(tmp_path, *data, "dataset.num_workers=2", "checkpoint.save_interval_updates=1000")
    for number, update in ((signal.SIGTERM, 8), (signal.SIGUSR1, 17), (signal.SIGUSR2, 26)):
        run.start()
        run.wait_for(lambda update=update: run.last_update() >= update)
        run.signal(number)
        assert run.wait() == [REQUEUE_EXIT_CODE], run.log()[-3000:]
        assert re.search(f"stopping.*{signal.Signals(number).name}", run.log())
        assert run.checkpoint()["optimizer_history"][-1]["num_updates"] == run.last_update()
    run.finish()
    assert run.log().count("Loaded checkpoint") == 3
    same_outcome(run, straight(1))


@pytest.mark.faults(
    "SIGTERM, SIGUSR1 or SIGUSR2 before training starts",
    "the run ends at once with exit code 75; nothing is lost",
)
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_a_run_starts_up(
    data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """From the first import of fairseq."""
    monkeypatch.setitem(ENVIRONMENT, "SKILL_PREEMPTED_FILE", str(tmp_path / "preempted"))
    run = Run(tmp_path / "run", *data).start()
    status = Path(f"/proc/{run.processes[0].pid}/status")

    def is_handled() -> bool:
        caught = next(line for line in status.read_text().splitlines() if line.startswith("SigCgt"))
        return bool(int(caught.split()[1], 16) >> (number - 1) & 1)

    run.wait_for(is_handled)
    assert "fairseq" not in run.log()  # it is importing torch
    run.signal(number)
    assert run.wait() == [REQUEUE_EXIT_CODE]
    assert (tmp_path / "preempted").read_text() == f"{number.name}\n"
    assert re.search(f"{number.name}.*not started|not started.*{number.name}", run.log())


def pretraining(speech: Path, folder: Path) -> list[str]:
    """Data for fairseq's hubert_pretraining: the same speech, with a random unit for each frame (50 Hz)."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for split in ("train", "valid"):
        manifest = read_manifest(speech / f"{split}.tsv")
        write_manifest(folder / f"{split}.tsv", str(speech), manifest.paths, manifest.sizes)
        units = (" ".join(map(str, random.integers(10, size=size // 320))) for size in manifest.sizes)
        (folder / f"{split}.km").write_text("".join(f"{line}\n" for line in units))
    (folder / "dict.km.txt").write_text("".join(f"{unit} 1\n" for unit in range(10)))
    return [f"task.data={folder}", f"task.label_dir={folder}", "task.label_rate=50", "dataset.batch_size=1"]


@pytest.mark.faults(
    "SIGTERM reaches the data-loading workers too",
    "they survive it, with any dataset; the training process decides",
)
@pytest.mark.slow
@pytest.mark.parametrize("task", ["skill_distillation", "hubert_pretraining"])
def test_loading_workers_outlive_the_signal(data: list[str], speech: Path, tmp_path: Path, task: str) -> None:
    """It may reach them first; their death would end the run at the next wait for a batch."""
    many = ["dataset.num_workers=2", "optimization.max_update=70", "checkpoint.save_interval_updates=1000"]
    if task == "skill_distillation":
        run = Run(tmp_path / "run", *data, "dataset.max_tokens=9000", *many)
    else:
        config = ("pretrain", "wavlm_tiny_speech", [*LOGGED, "common.cpu=true", "model.encoder_layers=2"])
        run = Run(tmp_path / "run", *pretraining(speech, tmp_path / "units"), *many, config=config)
    run.start()
    run.wait_for(lambda: run.last_update() >= 3)
    parents = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = (line.split() for line in parents.splitlines())
    workers = [int(child) for child, parent in pairs if int(parent) == run.processes[0].pid]
    assert len(workers) >= 2
    for worker in workers:
        os.kill(worker, signal.SIGTERM)
    seen = run.last_update()
    run.wait_for(lambda: run.last_update() >= seen + 30)  # more than an epoch, or more than is buffered
    run.signal(signal.SIGTERM)
    assert run.wait() == [REQUEUE_EXIT_CODE]


@pytest.mark.faults(
    "SIGTERM, SIGUSR1 or SIGUSR2: preemption, the end of the time limit",
    "the update is finished and a checkpoint written; exit code 75 on every rank; no update is lost",
)
@pytest.mark.slow
def test_ranks_stop_together_when_one_is_asked(data: list[str], straight: Any, tmp_path: Path) -> None:
    run = Run(tmp_path, *data, "checkpoint.save_interval_updates=1000", world_size=2)
    run.start()
    run.wait_for(lambda: run.last_update() >= 10)
    run.signal(signal.SIGTERM, ranks=[1])
    assert run.wait() == [REQUEUE_EXIT_CODE] * 2, run.log()[-3000:]
    assert run.checkpoint()["optimizer_history"][-1]["num_updates"] == run.last_update()
    run.finish()
    same_outcome(run, straight(2))


OWN_HANDLER = """
import os, signal
import fairseq_cli.hydra_train

def requeue(number, frame):
    with open("requeued", "w") as file:
        file.write(f"{number} {os.path.exists('checkpoint_last.pt')}")

signal.signal(signal.SIGUSR2, requeue)
fairseq_cli.hydra_train.cli_main()
"""


@pytest.mark.faults(
    "submitit waits for the signal itself",
    "its handler, which requeues the job, is called after the checkpoint is written",
)
@pytest.mark.slow
def test_a_handler_that_was_there_is_called_once_all_is_saved(data: list[str], tmp_path: Path) -> None:
    """submitit's, which requeues the job."""
    (tmp_path / "program.py").write_text(OWN_HANDLER)
    program = (sys.executable, "program.py")
    run = Run(tmp_path, *data, "checkpoint.save_interval_updates=1000", program=program)
    run.start()
    run.wait_for(lambda: run.last_update() >= 3)
    assert not (tmp_path / "checkpoint_last.pt").exists()
    run.signal(signal.SIGUSR2)
    assert run.wait() == [REQUEUE_EXIT_CODE]
    assert (tmp_path / "requeued").read_text() == f"{int(signal.SIGUSR2)} True"


def test_signals_are_noted_and_given_back() -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    preemption = Preemption()
    preemption.install()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert preemption.received == signal.SIGTERM
        preemption.install()  # a second run in the process does not mistake itself for the previous handler
    finally:
        preemption.uninstall()
    assert preemption.received is None
    assert {number: signal.getsignal(number) for number in SIGNALS} == before
