"""Data-loading workers that outlive a signal meant for the training process, whatever the dataset is."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any, Callable, Optional

from torch.utils.data import DataLoader

_CAN_WAIT = hasattr(signal, "sigwaitinfo")  # not on macOS


class ShieldedLoader(DataLoader):
    """torch's, except that its workers stay when SIGTERM goes to every process of a job, as Slurm's does.

    torch's worker would die of it, and its parent, in the middle of an update, of "DataLoader worker is killed by
    signal: Terminated". The parent's own SIGTERM still ends the worker, and so does the parent's end.
    """

    def __init__(
        self, dataset: Any, *, worker_init_fn: Optional[Callable[[int], None]] = None, **settings: Any
    ) -> None:
        super().__init__(dataset, worker_init_fn=functools.partial(_begin, worker_init_fn), **settings)

    def __iter__(self) -> Any:
        """torch's; workers that it starts have SIGTERM blocked from their first moment."""
        with _blocked():
            return super().__iter__()


@contextlib.contextmanager
def _blocked() -> Iterator[None]:
    """SIGTERM comes afterwards, in this thread and in processes that it starts meanwhile."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM} if _CAN_WAIT else ())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(worker_init_fn: Optional[Callable[[int], None]], worker: int) -> None:
    """The first call of a worker."""
    if _CAN_WAIT:
        _wait_for_parent()
    if worker_init_fn is not None:
        worker_init_fn(worker)


def _wait_for_parent() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # not inherited by a forkserver's workers
    parent = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


class _View:
    """A module as one importer sees it: a few names replaced, all others the module's own."""

    def __init__(self, module: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def shield_workers(iterators: Any) -> None:
    """Gives fairseq's epoch iterators, which make their loaders as ``torch.utils.data.DataLoader``, the shielded one.

    Args:
        iterators: the module ``fairseq.data.iterators``.
    """
    torch = iterators.torch
    data = _View(torch.utils.data, DataLoader=ShieldedLoader)
    iterators.torch = _View(torch, utils=_View(torch.utils, data=data))
