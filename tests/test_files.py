"""Atomic writing and hashes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from skill_fairseq.files import atomic_write, content_sha256, read_json, sha256, write_json


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
    with pytest.raises(IsADirectoryError, match="name a file inside it"):
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
