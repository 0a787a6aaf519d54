"""Writes folders atomically."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from skill_fairseq.files import PathLike, check_place, lock, named, naming, remove_orphans, sync, temporary_path


def check_folder(path: PathLike, field: str = "") -> None:
    """Checks that the folder that `field` names can be created, or exists and is empty.

    Raises:
        FileExistsError: `path` exists and is not an empty folder.
        OSError: it cannot be created.
    """
    target = Path(path)
    with named(field), naming(path):
        if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
            raise FileExistsError(f"{target}: exists already; give the name of a new folder, or remove it first")
        check_place(Path(os.path.realpath(target)))


@contextlib.contextmanager
def atomic_folder(path: PathLike) -> Iterator[Path]:
    """Yields a temporary folder beside `path`, which is renamed to `path` when the block succeeds.

    Removes temporary folders that a killed process left for the same `path`.

    Raises:
        FileExistsError: `path` exists and is not an empty folder.
        OSError: it cannot be created; names `path`, never the temporary folder.
    """
    check_folder(path)
    target = Path(os.path.realpath(path))
    temporary = temporary_path(target)
    number = None
    try:
        with naming(path, temporary):
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_orphans(target)
            temporary.mkdir()
            number = lock(temporary)
            yield temporary
            for file in temporary.rglob("*"):
                sync(file)
            if target.exists():
                target.rmdir()
            temporary.rename(target)
            sync(target.parent)
    finally:
        if number is not None:
            os.close(number)
        shutil.rmtree(temporary, ignore_errors=True)
