"""Shared by the tests of disturbed runs: their data, and the undisturbed run."""

from __future__ import annotations

from pathlib import Path
from typing import Callable

import pytest
from disturbed import Run


@pytest.fixture(scope="session")
def data(speech: Path, teacher_file: Path) -> list[str]:
    return [f"task.data={speech}", f"task.teacher={teacher_file}"]


@pytest.fixture(scope="session")
def straight(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Run]:
    """The undisturbed run of 40 updates, by number of processes."""
    made: dict[int, Run] = {}

    def run(world_size: int) -> Run:
        if world_size not in made:
            folder = tmp_path_factory.mktemp(f"straight{world_size}")
            made[world_size] = Run(folder, *data, world_size=world_size).finish()
            assert sorted(made[world_size].updates()) == list(range(1, 41))
        return made[world_size]

    return run
