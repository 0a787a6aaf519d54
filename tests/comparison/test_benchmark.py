"""examples/benchmark/run.py on a teacher and recordings that take seconds."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import soundfile
import yaml
from messages import says
from runs import WORST

import skill_fairseq
from skill_fairseq.audio.manifest import write_manifest
from skill_fairseq.checkpoints import load_encoder

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
DRIVER = ROOT / "examples" / "benchmark" / "run.py"
ENVIRONMENT = {
    **os.environ,
    "SKILL_FAIRSEQ_USER_DIR": str(Path(skill_fairseq.__file__).parent),
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
}
UPDATES = 40
THIN = [
    "model.encoder_layers=2",
    "model.encoder_embed_dim=16",
    'model.conv_feature_layers="[(8,10,5)] + [(8,3,2)] * 4 + [(16,2,2)] * 2"',
    "model.encoder_ffn_embed_dim=16",
]
"""A related system for the small teacher."""


def write_task(folder: Path, small: Any) -> Path:
    """Two classes, a low and a high voice; a few recordings each."""
    for split, count in {"train": 12, "valid": 4, "test": 10}.items():
        (folder / split).mkdir(parents=True)
        names, rows = [], ["utterance\tspeaker\tlabel"]
        for i in range(count):
            wave = small.tone(0.3, seed=100 * len(split) + i)
            name = f"{split}-{i}"
            soundfile.write(str(folder / split / f"{name}.wav"), wave[:: 1 + i % 2], 16000)
            names.append((f"{split}/{name}.wav", len(wave[:: 1 + i % 2])))
            rows.append(f"{name}\ts{i % 4}\t{i % 2}")
        write_manifest(folder / f"{split}.tsv", ".", *zip(*names))
        (folder / f"{split}.labels.tsv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, teacher_file: Path, speech: Path, small: Any) -> list[str]:
    folder = tmp_path_factory.mktemp("benchmark") / WORST
    folder.mkdir()
    stage = {
        "config": "distill/tiny",
        "overrides": ["dataset.max_tokens=60000", "checkpoint.save_interval_updates=4", "common.log_interval=1"],
    }
    gates = [f"optimizer.groups.{group}.lr_scheduler.warmup_updates=3" for group in ("gates", "multipliers")]
    grid = {
        "teacher": str(teacher_file),
        "data": str(speech),
        "tasks": [str(write_task(folder / "voice", small))],
        "cluster": ["--num-groups", "2"],
        "stage1": {**stage, "overrides": [*stage["overrides"], "criterion.sparsity_warmup=5", *gates]},
        "stage2": {**stage, "config": "final/tiny"},
        "updates": {"stage1": UPDATES, "stage2": 10},
        "methods": [
            "dphubert",
            "skill",
            "no_distillation",
            {"thin": {"config": "distill/tiny_starhubert", "overrides": THIN}},
        ],
        "sparsities": [0.5],
        "seeds": [1],
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump({"small": grid}))
    return [sys.executable, str(DRIVER), str(folder / "out"), "--grid", str(folder / "grid.yaml"), "--name", "small"]


def run(command: list[str], *more: str) -> subprocess.CompletedProcess:
    return subprocess.run([*command, *more], env=ENVIRONMENT, capture_output=True, text=True, timeout=600)


def test_interrupted_and_started_again_it_goes_on_and_compares(command: list[str]) -> None:
    out = Path(command[2])
    first = out / "runs" / "dphubert-0.5-1"
    child = subprocess.Popen([*command, "--jobs", "1"], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (first / "stage1" / "checkpoint_last.pt").is_file():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    said, _ = child.communicate(timeout=60)
    assert child.returncode == 130 and "dphubert-0.5-1: stopped in" in said and "failed" not in said
    assert not (first / "stage1" / "done").exists() and not (out / "table.md").exists()

    done = run(command, "--jobs", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    log = (first / "stage1" / "log").read_text()
    assert "Loaded checkpoint" in log and json.loads((first / "stage1" / "done").read_text())["attempts"] == 2
    assert "4 of 4" in done.stdout and (out / "table.md").read_text() in done.stdout

    found = {path.parent.name: json.loads(path.read_text()) for path in out.glob("runs/*/result.json")}
    assert set(found) == {"dphubert-0.5-1", "skill-0.5-1", "no_distillation-0.5-1", "thin-0.5-1"}
    assert found["dphubert-0.5-1"]["groups"] == [[0], [1], [2], [3]]
    assert found["dphubert-0.5-1"]["projection_sharing"] == [0, 1, 1, 1]
    full = load_encoder(yaml.safe_load(Path(command[4]).read_text())["small"]["teacher"]).num_parameters()
    for name, result in found.items():
        student = load_encoder(out / "runs" / name / "student.safetensors")
        assert result["costs"]["parameters"] == student.num_parameters()
        assert result["made"]["sparsity"]["actual"] == pytest.approx(1 - student.num_parameters() / full)
        assert abs(result["made"]["sparsity"]["actual"] - 0.5) < 0.005
        probe = result["probes"]["voice"]
        assert probe["total"] == len(probe["right"]) == 10 and probe["correct"] == probe["right"].count("1")
        kind, layers = ("cka", 3) if name == "thin-0.5-1" else ("cos", 4)
        assert len(result["distances"]["layers"][kind]) == layers
        assert len(result["distances"]["recordings"][kind]) == 6
        assert (result["made"]["cpu_seconds"] > 1) == (name != "no_distillation-0.5-1")
        assert probe["speakers"] == [f"s{i % 4}" for i in range(10)] and result["distances"]["speakers"] is None
        assert result["cpu"] and {"skill_fairseq", "fairseq", "scikit-learn"} <= set(result["versions"])
    thin = found["thin-0.5-1"]
    assert thin["recipe"] == "distill/tiny_starhubert" and set(thin["distances"]["recordings"]) == {"cka"}
    updates = [int(n) for n in re.findall(r"num_updates (\d+)", (out / "runs/thin-0.5-1/stage1/log").read_text())]
    assert max(updates) == UPDATES + 10  # as many as both stages
    assert len((out / "runs.csv").read_text().splitlines()) == 5 and "voice, s3" in (out / "runs.csv").read_text()
    near, far = (found[f"{m}-0.5-1"]["distances"]["layers"]["cos"][0] for m in ("dphubert", "no_distillation"))
    assert near < far  # after 50 updates, layer 0 is closer to the teacher than if pruned without training
    assert not list(out.glob("runs/*/stage*/checkpoint*.pt"))


def test_what_is_done_is_not_done_again(command: list[str]) -> None:
    out = Path(command[2])
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*.json")}
    done = run(command)
    assert done.returncode == 0 and "0 of 4" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*.json")} == before and len(before) == 8


@pytest.mark.nightly
def test_a_task_added_later_is_probed_on_the_students_that_are_there(command: list[str], small: Any) -> None:
    out, folder = Path(command[2]), Path(command[4]).parent
    students = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/student.safetensors")}
    more = ["--task", str(folder / "voice"), "--task", str(write_task(folder / "other", small))]
    done = run(command, *more)
    assert done.returncode == 0 and "4 of 4" in done.stdout and "other" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in out.glob("runs/*/student.safetensors")} == students
    assert all(set(json.loads(path.read_text())["probes"]) == {"voice", "other"} for path in out.glob("runs/*/res*"))
    assert run(command, "--table").returncode == 0


def test_other_settings_are_refused_in_the_same_folder(command: list[str], tmp_path: Path) -> None:
    grids = yaml.safe_load(Path(command[4]).read_text())
    grids["small"]["updates"] = {"stage1": 41, "stage2": 10}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grids))
    done = run([*command[:4], str(tmp_path / "grid.yaml"), *command[5:]])
    assert done.returncode == 2 and "give another OUT" in done.stderr
    assert "settings.json: stage1.optimization.max_update is 40, now 41;" in done.stderr


def test_another_training_label_is_another_recipe(command: list[str]) -> None:
    labels = Path(command[4]).parent / "voice" / "train.labels.tsv"
    text = labels.read_text()
    labels.write_text(text.replace("train-0\ts0\t0", "train-0\ts0\t1"))
    done = run(command, "--table")
    labels.write_text(text)
    assert done.returncode == 2 and "settings.json: tasks.voice.train.labels.tsv is" in done.stderr


def test_a_method_that_now_means_something_else_is_refused(command: list[str], tmp_path: Path) -> None:
    grids = yaml.safe_load(Path(command[4]).read_text())
    folder = Path(command[2]) / "runs" / "few-0.5-1"
    folder.mkdir()
    begun = {"groups": [[0, 1, 2, 3]], "projection_sharing": "none", "stage1": ["a.b=2"], "stage2": []}
    (folder / "target.json").write_text(json.dumps(begun))

    def table(num_groups: int) -> subprocess.CompletedProcess:
        variants = {"few": {"clustering": {"num_groups": num_groups}, "stage1": ["a.b=2"]}}
        grids["small"].update(methods=["dphubert", "few"], variants=variants)
        (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grids))
        return run([*command[:4], str(tmp_path / "grid.yaml"), *command[5:], "--table"])

    assert table(1).returncode == 0
    refused = table(2)
    assert refused.returncode == 2 and refused.stderr.count("{'groups': [[") == 2
    assert re.search(says("few-0.5-1/target.json", "{'groups': [[0, 1, 2, 3]]", "rename"), refused.stderr)
    shutil.rmtree(folder)


def test_a_run_that_fails_is_named_and_the_others_are_tabulated(command: list[str]) -> None:
    out = Path(command[2])
    (out / "runs" / "skill-0.5-1" / "result.json").unlink()
    (out / "runs" / "skill-0.5-1" / "student.safetensors").write_bytes(b"broken")
    done = run(command)
    assert done.returncode == 1 and "skill-0.5-1: failed, see" in done.stdout and "3 of 4 results" in done.stdout
    log = (out / "runs" / "skill-0.5-1" / "log").read_text().strip().splitlines()[-1]
    assert log.startswith("error: ") and "student.safetensors" in log
