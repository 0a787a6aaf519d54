"""Whether the student of examples/tiny/run.sh has learned: ``python tests/learned.py examples/tiny/out``.

Reads logs and results, prints its findings, and exits with 1 unless

- the gates' expected sparsity and that of the shrunk student are within 0.01 of the target;
- the last validation's distillation loss is below that of the student's shape with random weights, given the trained
  projections or none, whichever serves it better;
- the student's accuracy on digits is above that of random weights by more than the intervals of both; these are over
  recordings, as two speakers allow none over speakers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from skill_fairseq import load_encoder
from skill_fairseq.audio.manifest import load_audio, read_manifest
from skill_fairseq.checkpoints.load import read_source
from skill_fairseq.checkpoints.safe_load import load_torch_file
from skill_fairseq.objectives.group_means import GroupMeans, GroupMeansConfig
from skill_fairseq.probing.intervals import wilson
from skill_fairseq.reporting.training_log import read_log

MOST_APART = 0.01


def failures(out: Path) -> list[str]:
    """One line for each condition that does not hold.

    Raises:
        FileNotFoundError, KeyError, IndexError: a result is missing.
    """
    target = _config(out / "stage1")["criterion"]["target_sparsity"]
    expected = read_log(out / "stage1")["train_inner"][-1]["expected_sparsity"]
    actual = read_source(out / "shrunk.safetensors").provenance["sparsity"]["actual"]
    loss = read_log(out / "stage2")["valid"][-1]["distillation_loss"]
    random_loss = random_students_loss(out)
    entries = json.loads((out / "probe.json").read_text(encoding="utf-8"))["results"]
    digits = {entry["model"]: wilson(entry["correct"], entry["total"]) for entry in entries if entry["task"] == "digit"}
    low, high = digits["student"][0], digits["random"][1]
    checks = {
        f"sparsity: target {target}, expected by the gates {expected:.4f}": abs(expected - target) <= MOST_APART,
        f"sparsity: target {target}, of the shrunk student {actual:.4f}": abs(actual - target) <= MOST_APART,
        f"distillation loss: {loss:.4f} at last, {random_loss:.4f} with random weights": loss < random_loss,
        f"digits: the student's interval starts at {low:.3f}, that of random weights ends at {high:.3f}": low > high,
    }
    for said, holds in checks.items():
        print(f"{'ok    ' if holds else 'FAILED'} {said}")
    return [said for said, holds in checks.items() if not holds]


@torch.no_grad()
def random_students_loss(out: Path) -> float:
    """The loss on the first 20 recordings of valid.tsv, one at a time: the lower one with trained or no projections."""
    config = _config(out / "stage2")
    groups = yaml.safe_load((out / "clusters" / "groups.yaml").read_text(encoding="utf-8"))["groups"]
    teacher, shape = load_encoder(config["task"]["teacher"]), load_encoder(out / "student.safetensors").config
    torch.manual_seed(0)
    student = type(teacher)(shape).eval()
    fields = {name: config["criterion"][name] for name in ("projection_sharing", "normalize_states")}
    sides = [GroupMeans(GroupMeansConfig(groups=groups, **fields), shape, [teacher.config]) for _ in range(2)]
    state = load_torch_file(out / "stage2" / "checkpoint_last.pt")["criterion"]
    sides[0].load_state_dict({name.partition(".")[2]: value for name, value in state.items()})
    sums = [0.0, 0.0]
    files = read_manifest(Path(config["task"]["data"]) / "valid.tsv").files[:20]
    for file in files:
        wave = load_audio(file)[None]
        for which, objective in enumerate(sides):
            found = student.tap(wave, None, objective.student_taps)[0]
            wanted = teacher.tap(wave, None, objective.teacher_taps)[0]
            sums[which] += float(objective(found, wanted)[0]) / len(files)
    return min(sums)


def _config(stage: Path) -> Any:
    return yaml.safe_load((stage / ".hydra" / "config.yaml").read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(1 if failures(Path(sys.argv[1])) else 0)
