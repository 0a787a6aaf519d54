"""Signals that ask a training process to stop: noted when they come, answered when an update is finished."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from typing import Any, Dict, Optional

logger = logging.getLogger(__name__)

REQUEUE_EXIT_CODE = 75
"""Exit code of a run that was asked to stop and wants to be started again: EX_TEMPFAIL of sysexits.h."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""SIGTERM comes with preemption, SIGUSR1 or SIGUSR2 by ``sbatch --signal`` and submitit."""

_GRACE = 10.0  # s that other ranks wait for the one that requeues the job


class Preemption:
    """Records signals; the trainer looks at :attr:`received` where stopping is safe, and calls :meth:`leave`.

    Attributes:
        received: number of the last signal, None as long as none came.
    """

    def __init__(self) -> None:
        self.received: Optional[int] = None
        self._previous: Dict[int, Any] = {}

    def install(self) -> None:
        """Takes the signals over. Python allows it in the main thread only; elsewhere nothing happens."""
        if self._previous or threading.current_thread() is not threading.main_thread():
            return
        previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        # The start-up hook's handlers have done their part.
        self._previous = {n: signal.SIG_DFL if hasattr(h, "start_up") else h for n, h in previous.items()}

    def uninstall(self) -> None:
        """Restores the earlier signal handlers and forgets the signals received."""
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}
        self.received = None

    def _note(self, number: int, frame: Any) -> None:
        self.received = number

    def leave(self, rank: int = 0) -> None:
        """Ends the process with :data:`REQUEUE_EXIT_CODE`; call it once everything is saved.

        A handler that was there before is called first: submitit's requeues the job. It does so in rank 0; the others
        wait a little, so that the job does not end before.

        Raises:
            SystemExit: always.
        """
        name = signal.Signals(self.received).name if self.received else "a signal at another rank"
        logger.info(f"stopping because of {name}: the checkpoint is written, the same command goes on from it")
        if rank == 0 and os.environ.get("SKILL_PREEMPTED_FILE"):
            # For launchers of several tasks: srun may answer with another task's signal in place of the exit code.
            with open(os.environ["SKILL_PREEMPTED_FILE"], "w", encoding="utf-8") as file:
                file.write(name + "\n")
        before = self._previous.get(self.received or 0)
        number = self.received
        self.uninstall()
        if callable(before):
            before(number, None)
            if rank > 0:
                time.sleep(_GRACE)
        sys.exit(REQUEUE_EXIT_CODE)


preemption = Preemption()
"""That of this process: signals belong to a process, not to an object."""
