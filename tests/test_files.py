"""Atomic writing and hashes."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from messages import says

from skill_fairseq.exporting.folder import atomic_folder
from skill_fairseq.files import atomic_write, check_output, content_sha256, read_json, sha256, write_json


def test_atomic_write_replaces_in_one_step(tmp_path: Path) -> None:
    target = tmp_path / "new" / "model.safetensors"
    with atomic_write(target) as temporary:
        temporary.write_text("one")
        assert not target.exists()
        assert temporary.parent == target.parent and temporary.suffix == ".safetensors"
    with atomic_write(target) as temporary:
        temporary.write_text("two")
        assert target.read_text() == "one"
    assert target.read_text() == "two"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_atomic_write_keeps_the_old_file_when_writing_fails(tmp_path: Path, error: type) -> None:
    target = tmp_path / "groups.yaml"
    target.write_text("old")
    with pytest.raises(error):
        with atomic_write(target) as temporary:
            temporary.write_text("half")
            raise error
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_atomic_write_refuses_a_folder(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match=says(tmp_path, "file")):
        with atomic_write(tmp_path):
            pass


def test_sha256_of_several_pieces(tmp_path: Path) -> None:
    content = bytes(range(256)) * 9000  # 2.2 MiB
    (tmp_path / "file").write_bytes(content)
    assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "a.json", {"b": [1, 2.5, None]})
    assert read_json(tmp_path / "new" / "a.json") == {"b": [1, 2.5, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "new" / "a.json", {"b": float("nan")})
    assert read_json(tmp_path / "new" / "a.json") == {"b": [1, 2.5, None]}
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a.json"]


def test_hash_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "a.bin").write_bytes(b"abc")
    lines = "".join(
        f"{hashlib.sha256(content).hexdigest()}  {name}\n"
        for name, content in [("a.bin", b"abc"), ("config.json", b"{}")]
    )
    assert content_sha256(tmp_path) == hashlib.sha256(lines.encode()).hexdigest()


def test_a_link_stays_a_link_and_permissions_stay(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    target, link = tmp_path / "data" / "real.json", tmp_path / "link.json"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to("data/real.json")
    write_json(link, [1])
    assert link.is_symlink() and read_json(target) == [1] and stat.S_IMODE(target.stat().st_mode) == 0o640
    (tmp_path / "dangling.json").symlink_to("data/new.json")
    write_json(tmp_path / "dangling.json", [2])
    assert (tmp_path / "dangling.json").is_symlink() and read_json(tmp_path / "data" / "new.json") == [2]


def test_a_new_file_has_the_permissions_that_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "a.json", [])
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o640


def test_the_temporary_file_of_a_private_one_is_private(tmp_path: Path) -> None:
    target = tmp_path / "secret.json"
    target.touch(mode=0o600)
    with atomic_write(target) as temporary:
        temporary.write_text("secret")
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600


def test_a_fifo_is_written_to_and_stays(tmp_path: Path) -> None:
    fifo, got = tmp_path / "fifo.json", []
    os.mkfifo(fifo)
    reader = threading.Thread(target=lambda: got.append(fifo.read_text()))
    reader.start()
    with atomic_write(fifo) as temporary:
        assert temporary.suffix == ".json"
        temporary.write_text("through")
    reader.join(30)
    assert got == ["through"] and stat.S_ISFIFO(fifo.stat().st_mode) and list(tmp_path.iterdir()) == [fifo]


def test_a_device_is_written_to_and_its_refusal_names_it() -> None:
    with atomic_write("/dev/null") as temporary:
        temporary.write_text("nobody reads this")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(OSError, match=says("/dev/full", os.strerror(errno.ENOSPC))):
        with atomic_write("/dev/full") as temporary:
            temporary.write_text("no room")


def test_own_output_is_neither_replaced_nor_emptied(tmp_path: Path) -> None:
    code = "import sys; sys.modules['fairseq'] = None\n"  # not needed here, and slow to import
    code += "from skill_fairseq.files import write_json; print('before', flush=True); write_json('/dev/stdout', [1])"
    with open(tmp_path / "log", "wb") as log:
        subprocess.run([sys.executable, "-c", code], stdout=log, check=True)
    assert (tmp_path / "log").read_text() == "before\n[\n 1\n]\n"


@pytest.mark.parametrize("name", ["n" * 255, "n" * 243 + ".safetensors", "a." + "s" * 253, "\u4f60" * 85])
def test_names_as_long_as_a_file_system_takes(tmp_path: Path, name: str) -> None:
    check_output(tmp_path / name, "OUT")
    write_json(tmp_path / name, [3])
    assert read_json(tmp_path / name) == [3] and [entry.name for entry in tmp_path.iterdir()] == [name]


def test_what_was_written_reaches_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(number: int) -> None:
        order.append("folder" if stat.S_ISDIR(os.fstat(number).st_mode) else os.readlink(f"/proc/self/fd/{number}"))
        fsync(number)

    def renamed(source: Path, target: Path) -> None:
        order.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_json(tmp_path / "a.json", [])
    assert ".a.skill-" in order[0] and order[1:] == ["rename", "folder"]


def test_errors_name_the_file_and_never_the_temporary_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cases = [tmp_path / "file" / "a.json", tmp_path / ("n" * 256), Path("/proc/nothing/a.json"), Path("/proc/a.json")]
    for path in cases:
        with pytest.raises(OSError) as caught:
            write_json(path, [])
        assert str(caught.value).startswith(f"{path}: ") and ".skill-" not in str(caught.value)
        with pytest.raises(OSError, match=says("--json", path)):
            check_output(path, "--json")
    with pytest.raises(OSError) as caught:
        with atomic_write(tmp_path / "a.json") as temporary:
            raise OSError(errno.ENOSPC, "No space left on device")
    assert re.search(says(tmp_path / "a.json", "No space left on device"), str(caught.value))
    with pytest.raises(OSError) as caught:
        with atomic_write(tmp_path / "a.json") as temporary:
            raise RuntimeError(f"{temporary}: some library's words")
    assert "a.json: some library's words" in str(caught.value) and ".skill-" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="other"):  # an error about another file does not change
        with atomic_write(tmp_path / "a.json"):
            open(tmp_path / "other")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_file_that_may_not_be_written_is_refused(tmp_path: Path) -> None:
    """The same for root, who can ignore permissions, with an immutable file."""
    with pytest.raises(OSError, match=says("OUT", tmp_path, "folder")):
        check_output(tmp_path, "OUT")
    source = tmp_path / "in.safetensors"
    source.write_text("input")
    (tmp_path / "link.safetensors").symlink_to(source)
    for out in (source, tmp_path / "link.safetensors"):
        with pytest.raises(ValueError, match=says("OUT", out, "overwritten")):
            check_output(out, "OUT", [source])
    check_output(tmp_path / "new" / "folder" / "a.json", "OUT", [source])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in.safetensors", "link.safetensors"]


KILLED = """
import os, signal, sys
sys.modules["fairseq"] = None
from skill_fairseq.exporting.folder import atomic_folder
from skill_fairseq.files import atomic_write
with (atomic_write if sys.argv[2] == "file" else atomic_folder)(sys.argv[1]) as temporary:
    (temporary if sys.argv[2] == "file" else temporary / "a").write_text("half")
    print("ready", flush=True)
    signal.pause()
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_orphans_of_a_killed_process_go_and_those_of_a_living_one_stay(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "model.safetensors"
    (tmp_path / ".model.skill-notes.safetensors").write_text("not ours")
    child = subprocess.Popen([sys.executable, "-c", KILLED, target, kind], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    temporary = {entry.name for entry in tmp_path.iterdir()} - {".model.skill-notes.safetensors"}
    assert len(temporary) == 1

    def once() -> set[str]:
        if kind == "file":
            write_json(target, [])
            target.unlink()
        else:
            with atomic_folder(target):
                pass
            target.rmdir()
        return {entry.name for entry in tmp_path.iterdir()}

    assert once() == {".model.skill-notes.safetensors", *temporary}
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert once() == {".model.skill-notes.safetensors"}


def test_atomic_folder_names_itself_in_errors_and_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with atomic_folder(tmp_path / "link") as temporary:
        (temporary / "a").write_text("1")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "a").read_text() == "1"
    with pytest.raises(OSError, match=says(tmp_path / "new", os.strerror(errno.ENOSPC))) as caught:
        with atomic_folder(tmp_path / "new") as temporary:
            raise OSError(errno.ENOSPC, "No space left on device", str(temporary / "model.safetensors"))
    assert ".skill-" not in str(caught.value)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link", "real"]
