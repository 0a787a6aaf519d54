"""Relative paths of a config start at the user's working directory, although hydra changes it."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import CONFIG, ENVIRONMENT

from skill_fairseq.checkpoints.safe_load import load_torch_file, plain
from skill_fairseq.training.paths import from_shell

GROUPS = "groups: [[0], [1, 2], [3]]\n"
SHORT = (
    *("optimization.max_update=2", "dataset.max_tokens=60000", "criterion.target_sparsity=0.1"),
    "criterion.groups_file=groups.yaml",
)


def test_without_hydra_the_working_directory_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/somewhere")
    assert from_shell("data/x") == str(tmp_path / "data" / "x")
    assert from_shell("/data/x") == "/data/x"
    assert from_shell("~/x") == "/somewhere/x"


def _say(queue: multiprocessing.Queue) -> None:
    queue.put((os.getcwd(), from_shell("data")))


def test_in_a_process_that_fairseq_starts_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts in hydra's folder, without a hydra that knows where the command was started."""
    began = Path(multiprocessing.process.ORIGINAL_DIR)
    monkeypatch.chdir(tmp_path)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=_say, args=(queue,))
    child.start()
    where, found = queue.get(timeout=120)
    child.join()
    assert where == str(tmp_path) and found == str(began / "data")


@pytest.mark.nightly
def test_both_stages_by_relative_paths(speech: Path, teacher_file: Path, tmp_path: Path) -> None:
    here = tmp_path / "project"
    here.mkdir()
    (here / "data").symlink_to(speech)
    (here / "models").symlink_to(teacher_file.parent)
    (here / "groups.yaml").write_text(GROUPS)
    program = str(Path(sys.executable).with_name("fairseq-hydra-train"))
    common = ["task.data=data", f"task.teacher=models/{teacher_file.name}", *SHORT]
    stage1 = "runs/one/checkpoints/checkpoint_last.pt"
    for kind, run, more in (
        ("distill", "one", ()),
        ("final", "two", (f"model.init_from={stage1}",)),
    ):
        where = ["--config-dir", str(CONFIG / kind), "--config-name", "tiny", f"hydra.run.dir=runs/{run}"]
        overrides = [o for o in common if kind == "distill" or not o.startswith("criterion.target")]
        result = subprocess.run(
            [program, *where, *overrides, *more], cwd=here, env=ENVIRONMENT, capture_output=True, text=True, timeout=600
        )
        assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    one, two = (
        plain(load_torch_file(here / "runs" / run / "checkpoints" / "checkpoint_last.pt")["cfg"])
        for run in ("one", "two")
    )
    assert one["task"]["data"] == str(here / "data") and one["model"]["init_from"] == one["task"]["teacher"]
    assert two["model"]["init_from"] == two["criterion"]["init_from"] == str(here / stage1)
    assert two["criterion"]["groups"] == [[0], [1, 2], [3]]
