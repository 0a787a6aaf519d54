"""Writes checkpoints atomically, and finds the newest undamaged one in a folder."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import List, Optional, Tuple

from fairseq.file_io import PathManager

logger = logging.getLogger(__name__)


class CheckpointNotWritten(Exception):
    """A checkpoint could not be written; older ones are unchanged."""


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    """Wraps writing ``path`` through ``path + ".tmp"``: leaves no half-written file, and explains errors.

    Errors that do not come from the operating system pass unchanged.

    Raises:
        CheckpointNotWritten: the operating system refused, for example because the disk is full.
    """
    before = sys.exc_info()[1]  # fairseq writes crash.pt while handling another error
    try:
        yield
    except Exception as error:
        with contextlib.suppress(OSError):
            os.remove(path + ".tmp")
        refusal = _refusal(error, before)
        if refusal is None:
            raise
        reason = (str(refusal) or type(refusal).__name__).splitlines()[0]
        raise CheckpointNotWritten(
            f"{path}: the checkpoint could not be written ({reason}). {_space(path)}; older checkpoints are intact. "
            "Free some space, or keep fewer (checkpoint.keep_interval_updates), and run the same command again"
        ) from error


def _refusal(error: BaseException, before: Optional[BaseException]) -> Optional[OSError]:
    """The operating system's error behind another one: torch's writer only says that it failed; the cause came
    first."""
    link: Optional[BaseException] = error
    while link is not None and link is not before:
        if isinstance(link, OSError):
            return link
        link = link.__cause__ or link.__context__
    return None


def _space(path: str) -> str:
    try:
        free = shutil.disk_usage(os.path.dirname(os.path.abspath(path))).free
    except OSError as error:
        return f"The folder cannot be read ({error})"
    return f"{free / 1e9:.2f} GB are free there"


class WholeCopies(PathManager):
    """fairseq's file manager with atomic copies.

    fairseq renames one checkpoint into place, but copies it to ``checkpoint_last.pt`` byte by byte: a run killed
    meanwhile has no last checkpoint.
    """

    @staticmethod
    def copy(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
        """Copies a local file through a temporary name; others like fairseq."""
        if PathManager.path_requires_pathmanager(dst_path):
            return PathManager.copy(src_path, dst_path, overwrite=overwrite)
        with writing(dst_path):
            shutil.copyfile(src_path, dst_path + ".tmp")
            os.replace(dst_path + ".tmp", dst_path)
        return True


def damage(path: Path) -> Optional[str]:
    """The problem of a checkpoint file, or None: reads every byte and verifies checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except OSError as error:
        if error.errno != errno.EINVAL:  # a position before the file's start; other errors come from the disk
            raise
        return str(error)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        return str(error) or type(error).__name__
    return f"wrong checksum in {broken}" if broken else None


def older_checkpoints(last: Path) -> List[Path]:
    """Numbered checkpoints beside ``checkpoint_last.pt``, newest first."""
    suffix = re.escape(last.stem[len("checkpoint_last") :])
    pattern = re.compile(rf"checkpoint(?:_(?P<e>\d+)_(?P<updates>\d+)|(?P<epoch>\d+)){suffix}\.pt")
    found: List[Tuple[int, float, Path]] = []
    for path in last.parent.glob("checkpoint*.pt"):
        match = pattern.fullmatch(path.name)
        if match:
            epoch = int(match["e"] or match["epoch"])  # without updates: at the end of the epoch
            found.append((epoch, float(match["updates"] or "inf"), path))
    return [path for _, _, path in sorted(found, reverse=True)]


def newest_whole_checkpoint(last: Path) -> Path:
    """The checkpoint to resume from: ``last`` or, if it is damaged or missing, the newest undamaged one before it.

    Renames damaged files to ``*.damaged``, and removes half-written ones of a killed run.

    Args:
        last: ``checkpoint_last.pt`` of a run's folder; it need not exist.

    Returns:
        an undamaged file, or ``last`` if the folder has no checkpoint.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    for leftover in last.parent.glob("checkpoint*.pt.tmp"):
        leftover.unlink()
    damaged: List[str] = []
    for path in (last, *older_checkpoints(last)):
        if not path.is_file():
            continue
        problem = damage(path)
        if problem is None:
            if damaged or path != last:
                logger.warning(f"resuming from {path}, the newest undamaged checkpoint")
            return path
        aside = path.with_name(path.name + ".damaged")
        os.replace(path, aside)
        logger.warning(f"{path}: truncated or damaged ({problem}); renamed to {aside.name}")
        damaged.append(str(aside))
    damaged = damaged or sorted(str(path) for path in last.parent.glob("checkpoint*.pt.damaged"))
    if damaged:
        raise ValueError(
            f"{last.parent}: no undamaged checkpoint is left; damaged are {', '.join(damaged)}. Restore a copy of one, "
            "or remove them to start from the beginning"
        )
    return last
