"""Data-loading workers that survive a signal meant for the training process, with any dataset."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any, Callable, Optional

from _skill_fairseq_hook import View
from torch.utils.data import DataLoader

_END: Optional[int] = getattr(signal, "SIGRTMIN", None)
"""Signal from the training process to end. No other process sends it, and none is lost: real-time signals queue, while
the kernel merges two pending SIGTERMs. macOS has none, and uses torch's workers."""


class ShieldedLoader(DataLoader):
    """Like torch's, but its workers survive a SIGTERM to every process of a job, such as Slurm's.

    It would kill torch's worker, and in the middle of an update its parent, with "DataLoader worker is killed by
    signal:
    Terminated". The parent still ends the worker, with ``terminate`` or at its own exit.
    """

    def __init__(
        self, dataset: Any, *, worker_init_fn: Optional[Callable[[int], None]] = None, **settings: Any
    ) -> None:
        super().__init__(dataset, worker_init_fn=functools.partial(_begin, worker_init_fn), **settings)

    def __iter__(self) -> Any:
        """Like torch's, but starts workers with these signals blocked."""
        with _blocked():
            iterator: Any = super().__iter__()
        if self.num_workers > 0 and _END is not None:
            for worker in iterator._workers:  # multiprocessing ends them through _popen, at exit and in terminate()
                worker._popen.terminate = functools.partial(worker._popen._send_signal, _END)
        return iterator


def _block() -> set[int]:
    return signal.pthread_sigmask(signal.SIG_BLOCK, () if _END is None else {signal.SIGTERM, _END})


@contextlib.contextmanager
def _blocked() -> Iterator[None]:
    """Delays the signals in this thread, and in processes that it starts meanwhile, until the block ends."""
    before = _block()
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(worker_init_fn: Optional[Callable[[int], None]], worker: int) -> None:
    """Called first in a worker."""
    if _END is not None:
        _block()  # a forkserver's workers do not inherit it
        threading.Thread(target=_wait_for, args=[_END], daemon=True).start()
    if worker_init_fn is not None:
        worker_init_fn(worker)


def _wait_for(end: int) -> None:
    signal.sigwait({end})
    os._exit(0)


def shield_workers(iterators: Any) -> None:
    """Makes fairseq's epoch iterators use the shielded loader as ``torch.utils.data.DataLoader``.

    Args:
        iterators: the module ``fairseq.data.iterators``.
    """
    torch = iterators.torch
    data = View(torch.utils.data, DataLoader=ShieldedLoader)
    iterators.torch = View(torch, utils=View(torch.utils, data=data))
