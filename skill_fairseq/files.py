"""Atomic writes, and hashes of files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from skill_fairseq.reading import PathLike, read_text

try:
    import fcntl
except ImportError:  # not Linux: encoders load there too
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def atomic_write(path: PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`; when the block succeeds, it is synced and renamed to `path`.

    The temporary name keeps the suffix, for writers that depend on it (images, safetensors). Missing folders are
    created. On any error, Ctrl-C included, the temporary file is removed and an existing `path` is unchanged. A link
    stays a link: its target is replaced. An existing file keeps its permissions. Devices, FIFOs and this process's own
    output are written to, not replaced. Temporary files that a killed process left for the same `path` are removed.

        with atomic_write("groups.yaml") as temporary:
            temporary.write_text("groups: []", encoding="utf-8")

    Raises:
        IsADirectoryError: `path` is a folder.
        OSError: it cannot be written; names `path`, never the temporary one.
    """
    with contextlib.ExitStack() as stack:
        with naming(path):
            target = None if is_stream(path) else Path(os.path.realpath(path))
            if target is None:
                temporary = temporary_path(Path(stack.enter_context(tempfile.TemporaryDirectory()), Path(path).name))
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                remove_orphans(target)
                temporary = temporary_path(target)
                stack.enter_context(_reserved(target, temporary))
        with naming(path, temporary):
            yield temporary
        with naming(path), open(temporary, "rb") as written:
            if target is None:
                with _stream(path) as sink:
                    shutil.copyfileobj(written, sink)
            else:
                os.fsync(written.fileno())
                os.replace(temporary, target)
                sync(target.parent)


def check_output(path: PathLike, field: str, inputs: Iterable[PathLike] = ()) -> None:
    """Checks, before any work, that a file can be written; leaves nothing behind.

    Args:
        path: the file to write.
        field: option that names it, for messages.
        inputs: files that are read; `path` must not be one of them.

    Raises:
        OSError: it is a folder, a parent is a file, there is no permission, the name is too long, ...
        ValueError: it is one of the inputs.
    """
    with named(field), naming(path):
        if is_stream(path):
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return
        target = Path(os.path.realpath(path))
        remove_orphans(target)
        if target in {Path(os.path.realpath(source)) for source in inputs}:
            raise ValueError(f"{field}: {path} is read from and would be overwritten; name another file")
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        check_place(target)


def check_place(target: Path) -> None:
    """Checks that something can be created at this absolute path, in the nearest existing folder.

    Raises:
        OSError: it cannot.
    """
    folder = next(folder for folder in target.parents if folder.exists())
    with tempfile.TemporaryFile(dir=folder):
        longest = os.pathconf(folder, "PC_NAME_MAX")
    if any(len(os.fsencode(part)) > longest for part in target.parts):
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))


def temporary_path(target: Path) -> Path:
    """A hidden name beside `target` with its suffix, within the length limit of file systems."""
    return target.with_name(f"{_temporary_stem(target)}{uuid.uuid4().hex[:8]}{_short_suffix(target)}")


def remove_orphans(target: Path) -> None:
    """Removes the temporary files of `target` that killed processes left; live processes hold a lock on theirs."""
    pattern = re.compile(re.escape(_temporary_stem(target)) + "[0-9a-f]{8}" + re.escape(_short_suffix(target)))
    with contextlib.suppress(OSError):
        for name in os.listdir(target.parent):
            path = target.with_name(name)
            if pattern.fullmatch(name) and _is_free(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def lock(path: Path) -> int:
    """Opens and locks a temporary file or folder, so that no process removes it as an orphan; close the result to
    unlock."""
    number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    if fcntl is not None:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return number


def sync(path: Path) -> None:
    """Syncs a file, or a folder's entries, to disk, if the file system supports it."""
    with contextlib.suppress(OSError):
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _temporary_stem(target: Path) -> str:
    return f".{target.stem[:40]}.skill-"


def _short_suffix(target: Path) -> str:
    return target.suffix if len(target.suffix) <= 16 else ""


def _is_free(path: Path) -> bool:
    if fcntl is None or path.is_symlink():
        return False
    try:
        number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(number)
    return True


@contextlib.contextmanager
def _reserved(target: Path, temporary: Path) -> Iterator[None]:
    """Creates an empty, locked file with the permissions of `target`; removes it afterwards unless it was renamed."""
    before = os.stat(target) if target.exists() else None
    if before is not None and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    mode = 0o666 if before is None else stat.S_IMODE(before.st_mode)
    number = None
    try:  # before the file exists, because a signal may come in between
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
        number = lock(temporary)
        if before is not None:
            with contextlib.suppress(PermissionError):  # another user's file in our folder
                os.chown(temporary, before.st_uid, before.st_gid)
            os.chmod(temporary, mode)
        yield
    finally:
        if number is not None:
            os.close(number)
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def is_stream(path: PathLike) -> bool:
    """Whether a path is a device, a FIFO, or this process's own output.

    Raises:
        OSError: it is a folder, or cannot be written to.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return False
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(f"{path}: is a folder, expected the name of a file to write; name a file inside it")
    if stat.S_ISREG(found.st_mode):
        return _own_output(found) is not None
    if stat.S_ISCHR(found.st_mode) or stat.S_ISFIFO(found.st_mode) or _own_output(found) is not None:
        return True
    raise OSError(f"{path}: is a {'disk' if stat.S_ISBLK(found.st_mode) else 'socket'}, expected a file to write")


def _own_output(found: os.stat_result) -> int | None:
    for number in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(found, os.fstat(number)):
                return number
    return None


def _stream(path: PathLike) -> BinaryIO:
    """A stream to write to; our own output is not reopened, which would truncate it."""
    number = _own_output(os.stat(path))
    return open(path, "wb") if number is None else os.fdopen(os.dup(number), "wb")


@contextlib.contextmanager
def naming(path: PathLike, temporary: Path | None = None) -> Iterator[None]:
    """Makes OSErrors name `path` where they name no file or the temporary one."""
    try:
        yield
    except OSError as error:
        ours = temporary is None or error.filename is None or str(error.filename).startswith(str(temporary))
        if error.errno is None or not ours:
            raise
        raise _refused(path, error, error.strerror) from error
    except Exception as error:
        if temporary is None or temporary.name not in str(error):
            raise
        raise _refused(path, error, str(error).replace(str(temporary), str(path))) from error


def _refused(path: PathLike, error: Exception, reason: str | None) -> OSError:
    kind = type(error) if isinstance(error, OSError) else OSError
    return kind(f"{path}: cannot be written ({reason}); free some space or name a writable place")


def write_file(path: PathLike, content: str | bytes | memoryview) -> None:
    """Writes a file atomically, see :func:`atomic_write`; text in UTF-8, with unchanged line breaks."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def json_text(content: Any) -> str:
    """JSON text as files and commands have it.

    Raises:
        ValueError: a number in it is NaN or infinite, which JSON cannot hold.
    """
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def write_json(path: PathLike, content: Any) -> None:
    """Writes a JSON file atomically.

    Raises:
        ValueError: see :func:`json_text`.
    """
    write_file(path, json_text(content))


def read_json(path: PathLike) -> Any:
    """Reads a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not JSON; see :func:`parse_json`.
    """
    return parse_json(read_text(path), f"{path}: ")


def parse_json(text: str | bytes, where: str, remedy: str = "write it again") -> Any:
    """JSON, bytes of which are UTF-8.

    Raises:
        ValueError: it is not JSON, too deep, or has numbers that JSON cannot hold; begins with ``where``.
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}is not JSON ({error}); {remedy}") from error


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


@contextlib.contextmanager
def named(field: str) -> Iterator[None]:
    """Prefixes errors about files and values with the config field that they come from.

    Raises:
        OSError, ValueError: those of the block, prefixed with ``field``.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        if str(error).startswith(field):
            raise
        kind = type(error) if isinstance(error, OSError) and type(error).__module__ == "builtins" else ValueError
        raise kind(f"{field}: {error}") from error


def size_of(path: Path) -> int:
    """Size in bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())


def sha256(path: PathLike) -> str:
    """Hexadecimal SHA-256 of a file, read in chunks of 1 MiB.

    Raises:
        FileNotFoundError: no such file.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for piece in iter(lambda: stream.read(1 << 20), b""):
            digest.update(piece)
    return digest.hexdigest()


def content_sha256(path: PathLike) -> str:
    """SHA-256 of a file; for a folder, of the lines ``<sha256>  <name>`` of its files, sorted by name.

    Raises:
        FileNotFoundError: no such file or folder.
    """
    path = Path(path)
    if not path.is_dir():
        return sha256(path)
    lines = [f"{sha256(file)}  {file.name}\n" for file in sorted(path.iterdir()) if file.is_file()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
