"""Loading workers ignore SIGTERM; the training process still ends them."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import worker

from skill_fairseq.training.loading import ShieldedLoader


class Numbers(Dataset):
    """0 to 11, each from a process that first sends itself SIGTERM."""

    first = 0

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> int:
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGTERM)
        return index + self.first


def start_at_100(number: int) -> None:
    """A ``worker_init_fn``."""
    info = torch.utils.data.get_worker_info()
    assert info is not None and info.id == number
    info.dataset.first = 100


def batches(loader: Any) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_although_every_fetch_gets_the_signal(workers: int) -> None:
    expected = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    loader = ShieldedLoader(Numbers(), batch_size=4, num_workers=workers, persistent_workers=workers > 0)
    for _ in range(2):
        assert batches(loader) == expected
    with pytest.raises(RuntimeError, match="DataLoader worker .*(killed|exited)"):  # torch's own
        batches(DataLoader(Numbers(), batch_size=4, num_workers=2))


def test_the_datasets_own_start_of_a_worker_is_called_too() -> None:
    loader = ShieldedLoader(Numbers(), batch_size=6, num_workers=2, worker_init_fn=start_at_100)
    assert batches(loader) == [list(range(100, 106)), list(range(106, 112))]


def test_a_signal_in_a_workers_first_moment_does_not_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between torch's handler of SIGTERM, which ends the worker, and ``worker_init_fn``."""
    install = worker.signal_handling._set_worker_signal_handlers

    def install_and_be_signalled() -> None:
        install()
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(worker.signal_handling, "_set_worker_signal_handlers", install_and_be_signalled)
    assert len(batches(ShieldedLoader(Numbers(), batch_size=4, num_workers=2))) == 3
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())  # the parent listens again


@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_the_training_process_ends_a_worker_to_which_a_strangers_signal_is_pending(start: str) -> None:
    """Another SIGTERM would be lost, because the kernel keeps only one of each kind."""
    iterator: Any = iter(ShieldedLoader(Numbers(), batch_size=4, num_workers=1, multiprocessing_context=start))
    next(iterator)
    (process,) = iterator._workers
    process.join(timeout=0.2)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGSTOP)
    subprocess.run(["kill", "-TERM", str(process.pid)], check=True)
    process.terminate()
    os.kill(process.pid, signal.SIGCONT)
    process.join(timeout=60)
    assert process.exitcode == 0
