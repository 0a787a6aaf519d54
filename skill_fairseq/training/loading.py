"""Data-loading workers that outlive a signal meant for the training process, whatever the dataset is."""

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
"""From the training process: end. No other process sends it, and none is lost: real-time signals queue, where the
kernel makes one of two pending SIGTERMs. macOS has none; there workers are torch's."""


class ShieldedLoader(DataLoader):
    """torch's, except that its workers stay when SIGTERM goes to every process of a job, as Slurm's does.

    torch's worker would die of it, and its parent, in the middle of an update, of "DataLoader worker is killed by
    signal: Terminated". The parent still ends the worker, by ``terminate`` or by its own end.
    """

    def __init__(
        self, dataset: Any, *, worker_init_fn: Optional[Callable[[int], None]] = None, **settings: Any
    ) -> None:
        super().__init__(dataset, worker_init_fn=functools.partial(_begin, worker_init_fn), **settings)

    def __iter__(self) -> Any:
        """torch's; workers that it starts have the signals blocked from their first moment."""
        with _blocked():
            iterator: Any = super().__iter__()
        if self.num_workers > 0 and _END is not None:
            for worker in iterator._workers:  # multiprocessing ends them by the _popen, at exit as in terminate()
                worker._popen.terminate = functools.partial(worker._popen._send_signal, _END)
        return iterator


def _block() -> set[int]:
    return signal.pthread_sigmask(signal.SIG_BLOCK, () if _END is None else {signal.SIGTERM, _END})


@contextlib.contextmanager
def _blocked() -> Iterator[None]:
    """The signals come afterwards, in this thread and in processes that it starts meanwhile."""
    before = _block()
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(worker_init_fn: Optional[Callable[[int], None]], worker: int) -> None:
    """The first call of a worker."""
    if _END is not None:
        _block()  # not inherited by a forkserver's workers
        threading.Thread(target=_wait_for, args=[_END], daemon=True).start()
    if worker_init_fn is not None:
        worker_init_fn(worker)


def _wait_for(end: int) -> None:
    signal.sigwait({end})
    os._exit(0)


def shield_workers(iterators: Any) -> None:
    """Gives fairseq's epoch iterators, which make their loaders as ``torch.utils.data.DataLoader``, the shielded one.

    Args:
        iterators: the module ``fairseq.data.iterators``.
    """
    torch = iterators.torch
    data = View(torch.utils.data, DataLoader=ShieldedLoader)
    iterators.torch = View(torch, utils=View(torch.utils, data=data))
