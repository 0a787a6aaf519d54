"""Signals before a job's end: the update is finished, the checkpoint written, and the exit code says why."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from skill_fairseq.training.preemption import REQUEUE_EXIT_CODE, SIGNALS, Preemption


@pytest.mark.slow
def test_signals_to_every_process_lose_no_update(runs: Any, data: list[str], straight: Any, tmp_path: Path) -> None:
    """Slurm's SIGTERM reaches the loading workers too: they must not take the run down with them."""
    run = runs.Run(tmp_path, *data, "dataset.num_workers=2", "checkpoint.save_interval_updates=1000")
    for number, update in ((signal.SIGTERM, 8), (signal.SIGUSR1, 17), (signal.SIGUSR2, 26)):
        run.start()
        run.wait_for(lambda update=update: run.last_update() >= update)
        run.signal(number)
        assert run.wait() == [REQUEUE_EXIT_CODE], run.log()[-3000:]
        assert f"stopping because of {signal.Signals(number).name}" in run.log()
        assert run.checkpoint()["optimizer_history"][-1]["num_updates"] == run.last_update()
    run.finish()
    assert run.log().count("Loaded checkpoint") == 3
    runs.same_outcome(run, straight(1))


@pytest.mark.slow
def test_ranks_stop_together_when_one_is_asked(runs: Any, data: list[str], straight: Any, tmp_path: Path) -> None:
    run = runs.Run(tmp_path, *data, "checkpoint.save_interval_updates=1000", world_size=2)
    run.start()
    run.wait_for(lambda: run.last_update() >= 10)
    run.signal(signal.SIGTERM, ranks=[1])
    assert run.wait() == [REQUEUE_EXIT_CODE] * 2, run.log()[-3000:]
    assert run.checkpoint()["optimizer_history"][-1]["num_updates"] == run.last_update()
    run.finish()
    runs.same_outcome(run, straight(2))


OWN_HANDLER = """
import os, signal
import fairseq_cli.hydra_train

def requeue(number, frame):
    with open("requeued", "w") as file:
        file.write(f"{number} {os.path.exists('checkpoint_last.pt')}")

signal.signal(signal.SIGUSR2, requeue)
fairseq_cli.hydra_train.cli_main()
"""


@pytest.mark.slow
def test_a_handler_that_was_there_is_called_once_all_is_saved(runs: Any, data: list[str], tmp_path: Path) -> None:
    """submitit's, which requeues the job."""
    (tmp_path / "program.py").write_text(OWN_HANDLER)
    program = (sys.executable, "program.py")
    run = runs.Run(tmp_path, *data, "checkpoint.save_interval_updates=1000", program=program)
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
        preemption.install()  # a second run in the process does not take itself for the handler before
    finally:
        preemption.uninstall()
    assert preemption.received is None
    assert {number: signal.getsignal(number) for number in SIGNALS} == before
