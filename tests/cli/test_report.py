"""skill-report on a real fairseq training run, and its options."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from messages import says

import skill_fairseq
from skill_fairseq.cli import cluster, export, shrink
from skill_fairseq.cli.report import main

CONFIG = Path(__file__).resolve().parents[2] / "config"
UPDATES = 12


def train(folder: Path, config: str, *overrides: str) -> None:
    command = [str(Path(sys.executable).with_name("fairseq-hydra-train")), "--config-dir", str(CONFIG / config)]
    command += ["--config-name", "tiny", f"hydra.run.dir={folder}", f"checkpoint.save_dir={folder}", *overrides]
    command += ["dataset.max_tokens=60000", f"optimization.max_update={UPDATES}", "common.log_interval=1"]
    environment = {
        **os.environ,
        "SKILL_FAIRSEQ_USER_DIR": str(Path(skill_fairseq.__file__).parent),
        "PYTHONPATH": os.pathsep.join([str(CONFIG.parent), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
def test_a_real_run_from_clusters_to_page(
    tmp_path: Path, teacher_file: Path, speech: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    manifest = ["--manifest", str(speech / "train.tsv"), "--num-groups", "2", "--out", str(run / "clusters")]
    assert cluster.main(["--teacher", str(teacher_file), *manifest]) == 0
    common = [
        f"task.data={speech}",
        f"task.teacher={teacher_file}",
        f"criterion.groups_file={run}/clusters/groups.yaml",
    ]
    warmups = [f"optimizer.groups.{g}.lr_scheduler.warmup_updates=3" for g in ("default", "gates", "multipliers")]
    train(run / "stage1", "distill", *common, *warmups, "criterion.sparsity_warmup=6", "common.log_format=json")
    checkpoint = run / "stage1" / "checkpoint_last.pt"
    assert shrink.main([str(checkpoint), str(run / "shrunk.safetensors")]) == 0
    train(run / "stage2", "final", *common, f"model.init_from={checkpoint}", "lr_scheduler.warmup_updates=3")
    assert export.main([str(run / "stage2" / "checkpoint_last.pt"), str(run / "student.safetensors")]) == 0
    capsys.readouterr()

    assert main([str(run)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"wrote {run / 'report' / 'report.html'}, ")
    html = (run / "report" / "report.html").read_text(encoding="utf-8")

    entries = []
    for line in (run / "stage1" / "hydra_train.log").read_text().splitlines():
        found = re.search(r"\[train_inner\]\[INFO\] - (\{.*\})", line)
        if found:
            entries.append(json.loads(found[1]))
    assert len(entries) == UPDATES
    for entry in entries:
        values = [float(entry[name]) for name in ("distillation_loss", "expected_sparsity", "target_sparsity")]
        cells = [str(entry["num_updates"]), *(f"{value:.4f}" for value in values)]
        assert "".join(f"<td>{cell}</td>" for cell in cells) in html
    simple = re.findall(
        r"distillation_loss=(-?[\d.]+), .*num_updates=(\d+)", (run / "stage2" / "hydra_train.log").read_text()
    )
    assert len(simple) == UPDATES
    for loss, update in simple:
        assert f"<td>{update}</td><td>{float(loss):.4f}</td>" in html
    provenance = shrink.read_source(run / "shrunk.safetensors").provenance["sparsity"]
    assert f"expected: {provenance['expected']}" in html
    assert f"criterion.groups_file={run}/clusters/groups.yaml" in html  # the command to repeat it
    assert re.search("<li>probe.json: .*skill-probe --json.*</li>", html)


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert re.fullmatch(says("error", tmp_path, "folder of a run") + r"[^\n]*\n", capsys.readouterr().err)
    assert main([str(tmp_path), "--max-seconds", "0"]) == 2
    assert capsys.readouterr().err.startswith("error: --max-seconds: 0.0")
    assert not (tmp_path / "report").exists()


def test_without_matplotlib_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([str(tmp_path)]) == 2
    assert re.search(says("skill-report", "matplotlib", "pip install '.[plots]'"), capsys.readouterr().err)
