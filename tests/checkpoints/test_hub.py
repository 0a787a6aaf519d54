"""Models of the Hugging Face hub, through its own client, from a server on 127.0.0.1."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import COMMIT, Hub, hub
from messages import says

from skill_fairseq.checkpoints import load_encoder, save_encoder
from skill_fairseq.checkpoints.hub import local_copy
from skill_fairseq.cli import export

pytest.importorskip("huggingface_hub", minversion="0.20")


def run(server: Hub, home: Path, code: str, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a new process, because huggingface_hub reads the environment when imported."""
    own = {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_test", **env}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True)


LOAD = """
import sys, torch, skill_fairseq
encoder = skill_fairseq.load_encoder(sys.argv[1])
torch.save(encoder(torch.linspace(-1, 1, 4000)[None]).x.detach(), sys.argv[2])
"""


@pytest.fixture
def folder(small: Any, tmp_path: Path) -> Path:
    """A folder from skill-export."""
    save_encoder(small.random_encoder(), tmp_path / "teacher.safetensors")
    assert export.main([str(tmp_path / "teacher.safetensors"), str(tmp_path / "folder"), "--to", "huggingface"]) == 0
    return tmp_path / "folder"


def test_it_is_fetched_once_and_computes_the_same(folder: Path, tmp_path: Path) -> None:
    with torch.no_grad():
        wanted = load_encoder(folder)(torch.linspace(-1, 1, 4000)[None]).x
    out = tmp_path / "out.pt"
    with hub(folder) as server:
        done = run(server, tmp_path / "home", LOAD, "hf://user/repo@v1", out)
        assert done.returncode == 0, done.stderr
        torch.testing.assert_close(torch.load(out), wanted)
        fetched = [line for line in server.asked if line.startswith("GET") and "/resolve/" in line]
        assert any("safetensors" in line for line in fetched) and not any("README" in line for line in fetched)
        assert run(server, tmp_path / "home", LOAD, "hf://user/repo@v1", out).returncode == 0
        assert [line for line in server.asked if line.startswith("GET") and "/resolve/" in line] == fetched
    offline = run(server, tmp_path / "home", LOAD, f"hf://user/repo@{COMMIT}", out, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr


def test_a_repository_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    with hub(folder) as server:
        done = run(server, tmp_path / "home", LOAD, "hf://user/other", tmp_path / "out.pt")
    error = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and error.startswith("ValueError: hf://user/other: cannot be downloaded (")


@pytest.mark.parametrize("name", ["hf://repo", "hf://user/repo/file", "hf://user/repo@", "hf://"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ValueError, match=says("hf://user/repo@revision")):
        local_copy(name)


def test_paths_stay_as_they_are(tmp_path: Path) -> None:
    assert local_copy(tmp_path / "a.pt") == tmp_path / "a.pt"
    with pytest.raises(FileNotFoundError):
        load_encoder(tmp_path / "hf")


PUSH = "import sys; from skill_fairseq.cli.export import main; sys.exit(main(sys.argv[1:]))"


def test_a_push_uploads_what_was_written_and_nothing_is_asked_without(folder: Path, tmp_path: Path) -> None:
    with hub(folder) as server:
        teacher, form = tmp_path / "teacher.safetensors", ("--to", "huggingface")
        assert run(server, tmp_path / "home", PUSH, teacher, tmp_path / "kept", *form).returncode == 0
        assert server.asked == []
        done = run(server, tmp_path / "home", PUSH, teacher, tmp_path / "new", *form, "--push", "user/repo")
        assert done.returncode == 0, done.stderr
        assert f"pushed: {server.url}/user/repo/" in done.stdout
        written = {f.name: f.read_bytes() for f in (tmp_path / "new").iterdir()}
        assert server.pushed == written and "Licence: the terms of the teacher" in written["README.md"].decode()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["x.onnx", "--push", "user/repo"], ["--push", "--to huggingface"]),
        (["folder", "--to", "huggingface", "--push", "repo"], ["--push", "'repo'", "user/repo"]),
        (["folder", "--to", "huggingface", "--private"], ["--private", "--push user/repo"]),
    ],
)
def test_a_push_that_cannot_be(words: list[str], said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main(["teacher.pt", *words]) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in said)
