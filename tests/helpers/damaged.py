"""Truncated files and files with a flipped bit, and limits of time and memory for reading them."""

from __future__ import annotations

import contextlib
import random
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

SECONDS = 20
GIGABYTES = 2


@contextlib.contextmanager
def bounds() -> Iterator[None]:
    """Fails on a hang, or on more than two gigabytes of additional memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (GIGABYTES << 30), before[1]))
    handler = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"no answer in {SECONDS} s"))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def spoiled(content: bytes, number: int, dice: random.Random) -> bytes:
    """Odd numbers truncate; even ones flip a bit, half of the time near an end, where the structure is."""
    if number % 2:
        return content[: dice.randrange(len(content))]
    near = dice.choice((len(content), min(len(content), 600)))
    place = dice.choice((dice.randrange(near), len(content) - 1 - dice.randrange(near)))
    return content[:place] + bytes([content[place] ^ (1 << dice.randrange(8))]) + content[place + 1 :]
