"""Runs contestants in separate processes that take turns, A B A B, so that a noisy machine affects both equally."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence

import numpy as np
import torch

from skill_fairseq.benchmarking.contestants import CONTESTANTS, Times
from skill_fairseq.benchmarking.setup import Setup
from skill_fairseq.messages import meant_for_users, out_of_memory


def reset_peak(device: str) -> None:
    """Resets the peak of memory."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: str) -> int:
    """Bytes: torch's peak allocation on a GPU, the process's peak resident size on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _serve(name: str, setup: Setup, what: str, pipe: Connection) -> None:
    """A contestant's process: builds the model, then makes a step on each request."""
    if setup.threads:
        torch.set_num_threads(setup.threads)
    try:
        if setup.device.startswith("cuda"):
            torch.cuda.set_device(torch.device(setup.device).index or 0)
        step, facts = CONTESTANTS[name](setup, what)
        pipe.send(facts)
        while pipe.recv() == "step":
            reset_peak(setup.device)
            times = step()
            pipe.send((times, peak_memory(setup.device)))
    except EOFError:
        pass
    except Exception as error:  # the parent reports it
        if out_of_memory(error):
            pipe.send(DoesNotFit(f"{name}: {(str(error) or type(error).__name__).splitlines()[0]}"))
        elif meant_for_users(error):
            pipe.send(ValueError(str(error)) if isinstance(error, ValueError) else OSError(str(error)))
        else:
            pipe.send(RuntimeError(f"{name}: {error}\n{traceback.format_exc()}"))


class DoesNotFit(MemoryError):
    """A step needs more memory than there is."""


def oom_kills() -> int:
    """Numbers of processes killed for lack of memory, on the system and in this process's group; -1 if unknown."""
    counts = []
    for path in ("/proc/vmstat", "/sys/fs/cgroup/memory.events"):
        with contextlib.suppress(OSError):
            fields = [line.split() for line in Path(path).read_text().splitlines()]
            counts += [int(value) for name, value in fields if name == "oom_kill"]
    return sum(counts) if counts else -1


class Contestant:
    """A handle on a contestant's process.

    Args:
        name: key of :data:`CONTESTANTS`.
        setup: what to measure.
        what: "train" or "infer".

    Raises:
        ValueError, OSError, RuntimeError: it could not be built.
        DoesNotFit: out of memory.
        ChildProcessError: its process crashed or was killed.
    """

    def __init__(self, name: str, setup: Setup, what: str) -> None:
        self._oom_kills = oom_kills()
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(name, setup, what, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.facts: Dict[str, Any] = self._receive()
        self.times: List[Times] = []
        self.peak = 0

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise self._ended() from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _ended(self) -> Exception:
        """Why the process ended by itself."""
        self._process.join()
        code = self._process.exitcode or 0
        if code == -signal.SIGKILL and oom_kills() > self._oom_kills:
            return DoesNotFit(f"{self.name}: the system killed its process for lack of memory")
        how = f"ended with code {code}"
        if code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
            if code == -signal.SIGKILL:
                how += " from outside: the system reports no lack of memory"
        return ChildProcessError(f"{self.name}: its process {how}; see what it printed above, if anything")

    def step(self, keep: bool = True) -> None:
        """Makes one step and records its times."""
        try:
            self._pipe.send("step")
        except ConnectionError:
            raise self._ended() from None
        times, peak = self._receive()
        if keep:
            self.times.append({**times, "total": sum(times.values())})
        self.peak = max(self.peak, peak)

    def close(self) -> None:
        """Ends the process."""
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.terminate()

    def result(self, setup: Setup) -> Dict[str, Any]:
        """Minimum and median seconds per phase, audio seconds per second, peak bytes, parameters, MACs."""
        seconds = {
            phase: {
                "min": float(np.min([times[phase] for times in self.times])),
                "median": float(np.median([times[phase] for times in self.times])),
            }
            for phase in self.times[0]
        }
        return {
            "seconds": seconds,
            "audio seconds per second": setup.batch * setup.seconds / seconds["total"]["min"],
            "peak bytes": self.peak,
            **self.facts,
        }


def take_turns(
    setups: Sequence[tuple[str, Setup]], what: str, repeats: int, warmup: int, progress: Callable[[], object]
) -> List[Dict[str, Any]]:
    """Measures contestants in turn.

    Args:
        setups: name and setup of each contestant.
        what: "train" or "infer".
        repeats: measured steps of each.
        warmup: unmeasured steps before.
        progress: called after every step.

    Returns:
        the result of each, see :meth:`Contestant.result`.
    """
    contestants: List[Contestant] = []
    try:
        for name, setup in setups:
            contestants.append(Contestant(name, setup, what))
        for turn in range(warmup + repeats):
            for contestant in contestants:
                contestant.step(keep=turn >= warmup)
                progress()
        return [c.result(setup) for c, (_, setup) in zip(contestants, setups)]
    finally:
        for contestant in contestants:
            contestant.close()


def largest_batch(setup: Setup, limit: int, progress: Callable[[], object]) -> tuple[int, int]:
    """The largest batch whose training step fits into memory.

    Args:
        setup: what to train; its ``batch`` is not used.
        limit: bytes.
        progress: called after every attempt.

    Returns:
        utterances, and the peak memory of their step in bytes.

    Raises:
        ValueError: not even one utterance fits.
        ChildProcessError: a process ended for another reason than lack of memory.
    """

    def peak_of(batch: int) -> int:
        contestant = None
        try:
            contestant = Contestant("skill_fairseq", dataclasses.replace(setup, batch=batch), "train")
            contestant.step()
            contestant.step()  # the optimizer's moments exist from the second step
            return contestant.peak
        except DoesNotFit:
            return limit + 1
        finally:
            progress()
            if contestant is not None:
                contestant.close()

    low, high, peak = 0, 1, 0
    grown = False
    while not grown or high - low > 1:
        tried = (low + high) // 2 if grown else high
        found = peak_of(tried)
        if found <= limit:
            low, peak = tried, found
            high = high if grown else 2 * tried
        else:
            grown, high = True, tried
    if not low:
        raise ValueError(
            f"--memory: {limit / 1e9:.2f} GB is not enough for a training step of {setup.seconds:g} s; give more, or "
            "fewer --seconds"
        )
    return low, peak
