"""Handles signals that ask training to stop: records them, and stops after the current update."""

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
"""Exit code of a run that stopped on request and should be restarted: EX_TEMPFAIL of sysexits.h."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Preemption sends SIGTERM; ``sbatch --signal`` and submitit send SIGUSR1 or SIGUSR2."""

_GRACE = 10.0  # s; how long other ranks wait for the one that requeues the job


class Preemption:
    """Records signals; the trainer checks :attr:`received` where stopping is safe, and calls :meth:`leave`.

    Attributes:
        received: number of the last signal, or None.
    """

    def __init__(self) -> None:
        self.received: Optional[int] = None
        self._previous: Dict[int, Any] = {}

    def install(self) -> None:
        """Installs the handlers. Python allows this in the main thread only; elsewhere it does nothing."""
        if self._previous or threading.current_thread() is not threading.main_thread():
            return
        previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        # The start-up hook's handlers are no longer needed.
        self._previous = {n: signal.SIG_DFL if hasattr(h, "start_up") else h for n, h in previous.items()}

    def uninstall(self) -> None:
        """Restores the previous signal handlers and forgets received signals."""
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}
        self.received = None

    def _note(self, number: int, frame: Any) -> None:
        self.received = number

    def leave(self, rank: int = 0) -> None:
        """Ends the process with :data:`REQUEUE_EXIT_CODE`; call it after everything is saved.

        Calls the previous handler first: submitit's requeues the job, in rank 0. The other ranks wait a little, so that
        the job does not end before.

        Raises:
            SystemExit: always.
        """
        name = signal.Signals(self.received).name if self.received else "a signal to another rank"
        logger.info(f"stopping because of {name}: the checkpoint is written; run the same command again to resume")
        if rank == 0 and os.environ.get("SKILL_PREEMPTED_FILE"):
            # For launchers of several tasks: srun may return another task's signal instead of the exit code.
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
"""The instance of this process, because signals belong to a process."""
