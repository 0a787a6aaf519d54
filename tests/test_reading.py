"""Reading text from any system, and finding files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from messages import says

from skill_fairseq.audio.manifest import read_manifest
from skill_fairseq.clustering.config_file import read_config
from skill_fairseq.files import read_json, write_file
from skill_fairseq.reading import find_files, read_text


@pytest.mark.parametrize("content", [b"a\n\xc3\xa9", b"\xef\xbb\xbfa\r\n\xc3\xa9", b"a\r\xc3\xa9"])
def test_marks_and_line_breaks_of_windows_are_left_out(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tsv").write_bytes(content)
    assert read_text(tmp_path / "a.tsv") == "a\n\u00e9"


@pytest.mark.parametrize(
    ("encoding", "line", "likely"),
    [("utf-16", 1, "UTF-16"), ("utf-16-le", 1, "UTF-16"), ("utf-16-be", 1, "UTF-16"), ("latin-1", 2, "ISO-8859-1")],
)
def test_other_encodings_are_refused_with_file_line_and_remedy(
    tmp_path: Path, encoding: str, line: int, likely: str
) -> None:
    file = tmp_path / "it's.tsv"
    file.write_bytes("/root\ncaf\u00e9.flac\t400\n".encode(encoding))
    for read in (read_text, read_manifest, read_config, read_json):
        with pytest.raises(ValueError, match=says(f"line {line}", "UTF-8", f"iconv -f {likely}")) as caught:
            read(file)
        assert str(caught.value).startswith(str(file)) and """'"'"'""" in str(caught.value)


def test_a_config_keeps_its_mark_and_its_line_breaks(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbfcriterion:\r\n  _name: x\r\n"
    (tmp_path / "a.yaml").write_bytes(content)
    write_file(tmp_path / "b.yaml", read_config(tmp_path / "a.yaml"))
    assert (tmp_path / "b.yaml").read_bytes() == content


def test_json_that_is_none_names_the_file(tmp_path: Path) -> None:
    for content in ("{", "[" * 100_000):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(ValueError, match=r"a\.json: is not JSON"):
            read_json(tmp_path / "a.json")


def test_links_are_followed_and_every_folder_is_visited_once(tmp_path: Path) -> None:
    for name in ("b/2", "b/1", "a/3", "skipped/4"):
        (tmp_path / "store" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "store" / name).touch()
    (tmp_path / "store" / "a" / "loop").symlink_to(tmp_path / "store")
    (tmp_path / "top").mkdir()
    (tmp_path / "top" / "link").symlink_to(tmp_path / "store")
    found = find_files(tmp_path / "top", lambda folder: folder.name != "skipped")
    assert [os.path.relpath(path, tmp_path / "top") for path in found] == ["link/a/3", "link/b/1", "link/b/2"]
    with pytest.raises(FileNotFoundError):
        list(find_files(tmp_path / "nothing"))
    refused: list[OSError] = []
    assert list(find_files(tmp_path / "nothing", unreadable=refused.append)) == [] and len(refused) == 1
