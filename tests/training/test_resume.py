"""Runs that are killed go on as if nothing had happened."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
from disturbed import Run, same_outcome

pytestmark = pytest.mark.slow


@pytest.mark.faults(
    "a process is killed (SIGKILL, a node goes down)",
    "the same command goes on from the last checkpoint; the outcome is the same, bit for bit",
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_three_kills_change_nothing(data: list[str], straight: Any, tmp_path: Path, world_size: int) -> None:
    """40 updates straight, and with SIGKILL at three random moments: the same bits."""
    moments = random.Random(world_size)
    run = Run(tmp_path, *data, world_size=world_size)
    for _ in range(3):
        update = run.last_update() + moments.randint(4, 7)  # later than where the last one came to
        run.start()
        run.wait_for(lambda update=update: run.last_update() >= update)
        time.sleep(moments.uniform(0, 0.05))
        run.kill()
    run.finish()
    assert run.log().count("Loaded checkpoint") == 3
    same_outcome(run, straight(world_size))
    run.finish()  # once more: nothing is left to do
    assert "nothing is left to do: 40 of optimization.max_update=40" in run.log()
    same_outcome(run, straight(world_size))


@pytest.mark.faults(
    "a process is killed (SIGKILL, a node goes down)",
    "the same command goes on from the last checkpoint; the outcome is the same, bit for bit",
)
def test_kills_in_the_middle_of_an_epoch_with_loading_workers(data: list[str], straight: Any, tmp_path: Path) -> None:
    """What workers load does not depend on them: the same bits as without."""
    run = Run(tmp_path, *data, "dataset.num_workers=2")
    run.start()
    run.wait_for(lambda: run.last_update() >= 11)
    run.kill()
    run.finish()
    same_outcome(run, straight(1))
