"""Writing a folder so that it is there as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from skill_fairseq.files import PathLike, check_place, lock, named, naming, remove_orphans, sync, temporary_path


def check_folder(path: PathLike, field: str = "") -> None:
    """Makes sure that a folder, which `field` names, can be made, or is there and empty.

    Raises:
        FileExistsError: `path` is there already and not an empty folder.
        OSError: it cannot be made.
    """
    target = Path(path)
    with named(field), naming(path):
        if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
            raise FileExistsError(f"{target}: exists already; expected the name of a new folder, or remove it first")
        check_place(Path(os.path.realpath(target)))


@contextlib.contextmanager
def atomic_folder(path: PathLike) -> Iterator[Path]:
    """Give a temporary folder beside `path`; when the block ends well, it becomes `path` in one step.

    Temporary folders that a killed process has left for the same `path` are removed.

    Raises:
        FileExistsError: `path` is there already and not an empty folder.
        OSError: it cannot be made; names `path`, never the temporary one.
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
