"""Locks a checkpoint folder for one run."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from pathlib import Path
from typing import IO, Dict

logger = logging.getLogger(__name__)

NAME = "run.lock"
_GRACE = 5.0  # s; a killed run's lock may need a moment to go away
_held: Dict[Path, IO[str]] = {}


def lock_run(folder: Path, grace: float = _GRACE) -> None:
    """Locks a folder against other trainings for the lifetime of this process.

    The lock is the kernel's (``fcntl``): it ends with the process in any case, and a leftover file locks nothing. On
    NFS it works between machines; if a machine is lost, the server releases the lock after its lease, about 90 s. A
    file system without locks (Lustre mounted without ``flock``) causes a warning.

    Args:
        folder: ``checkpoint.save_dir``, which must exist.
        grace: seconds to wait for a run that is about to end.

    Raises:
        ValueError: another process trains there; names it.
    """
    path = folder.resolve() / NAME
    if path in _held:
        return
    file = open(path, "a+", encoding="utf-8")
    end = time.monotonic() + grace
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                logger.warning(f"{path}: this file system has no locks ({error.strerror}); start no second run here")
                file.close()
                return
        if time.monotonic() > end:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise ValueError(
                f"checkpoint.save_dir: {folder}: {owner} trains there. Wait until it ends, or set another "
                "hydra.run.dir and checkpoint.save_dir"
            )
        time.sleep(0.2)
    job = f", Slurm job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}{job}\n")
    file.flush()
    _held[path] = file  # closing it would release the lock


def unlock_run(folder: Path) -> None:
    """Releases the lock before the process ends."""
    file = _held.pop(folder.resolve() / NAME, None)
    if file is not None:
        file.close()
