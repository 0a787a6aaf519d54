"""One run per checkpoint folder: others are locked out exactly as long as it lives."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from disturbed import Run
from messages import says

from skill_fairseq.training.run_lock import NAME, lock_run, unlock_run


def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    """Also after kill -9, which leaves the file."""
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        try:
            lock_run(tmp_path)
            os.write(tell, b"locked")
            signal.pause()
        finally:
            os._exit(1)
    assert os.read(told, 6) == b"locked"
    said = ("checkpoint.save_dir", tmp_path, f"process {child}", socket.gethostname(), "hydra.run.dir")
    with pytest.raises(ValueError, match=says(*said)):
        lock_run(tmp_path, grace=0)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / NAME).exists()
    lock_run(tmp_path, grace=0)
    try:
        lock_run(tmp_path, grace=0)  # a second run of the same process
        assert f"process {os.getpid()} " in (tmp_path / NAME).read_text()
    finally:
        unlock_run(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with caplog.at_level(logging.WARNING):
        lock_run(tmp_path)
    (record,) = caplog.records
    assert str(tmp_path) in record.message and os.strerror(number) in record.message


@pytest.mark.faults(
    "a second run is started in a run directory while the first is running",
    "the second ends before training and names the first's process and machine; the first continues",
)
@pytest.mark.slow
def test_a_second_run_in_the_same_directory_ends_and_the_first_goes_on(data: list[str], tmp_path: Path) -> None:
    first = Run(tmp_path, *data, "optimization.max_update=100000", "checkpoint.save_interval_updates=100000").start()
    first.wait_for(lambda: first.last_update() >= 1)
    second = Run(tmp_path / "second", *data, f"checkpoint.save_dir={tmp_path}", world_size=2)
    assert second.start().wait() == [1, 1]  # no rank waits for the other
    for rank in (0, 1):
        assert f"process {first.processes[0].pid} on" in second.log(rank)
    seen = first.last_update()
    first.wait_for(lambda: first.last_update() > seen)
    first.kill()
