"""Killed runs resume as if nothing had happened."""

from __future__ import annotations

import os
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from disturbed import Run, same_outcome

from skill_fairseq.checkpoints import load_encoder
from skill_fairseq.checkpoints.safe_load import load_torch_file

pytestmark = pytest.mark.slow


@pytest.mark.faults(
    "a process is killed (SIGKILL, a node goes down)",
    "the same command resumes from the last checkpoint; the result is identical, bit for bit",
)
@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.nightly), 2])
def test_three_kills_change_nothing(data: list[str], straight: Any, tmp_path: Path, world_size: int) -> None:
    """40 updates without interruption, and with SIGKILL at three random moments: identical bits."""
    moments = random.Random(world_size)
    run = Run(tmp_path, *data, world_size=world_size)
    for _ in range(3):
        update = run.last_update() + moments.randint(4, 7)  # later than the previous one's progress
        run.start()
        run.wait_for(lambda update=update: run.last_update() >= update)
        time.sleep(moments.uniform(0, 0.05))
        run.kill()
    run.finish()
    assert run.log().count("Loaded checkpoint") == 3 and "other batches" not in run.log()
    same_outcome(run, straight(world_size))
    run.finish()  # once more: nothing is left to do
    assert re.search("nothing.*optimization.max_update=40", run.log())
    same_outcome(run, straight(world_size))


@pytest.mark.nightly
@pytest.mark.faults(
    "a process is killed (SIGKILL, a node goes down)",
    "the same command resumes from the last checkpoint; the result is identical, bit for bit",
)
def test_kills_in_the_middle_of_an_epoch_with_loading_workers(data: list[str], straight: Any, tmp_path: Path) -> None:
    """Loading does not depend on workers: identical bits to loading without."""
    run = Run(tmp_path, *data, "dataset.num_workers=2")
    run.start()
    run.wait_for(lambda: run.last_update() >= 11)
    run.kill()
    run.finish()
    same_outcome(run, straight(1))


@pytest.mark.nightly
def test_a_kill_changes_nothing_where_ranks_have_gates(data: list[str], tmp_path: Path) -> None:
    """With two processes in bf16, initial matrices and their results are equal."""
    settings = ["model.pruning_units=[heads,ffn,rank]", "common.bf16=true", "optimization.max_update=10"]
    straight = Run(tmp_path / "straight", *data, *settings, world_size=2).finish()
    run = Run(tmp_path / "killed", *data, *settings, world_size=2)
    run.start()
    run.wait_for(lambda: run.last_update() >= 5)
    run.kill()
    run.finish()
    same_outcome(run, straight)
    encoder = load_encoder(tmp_path / "killed" / "checkpoint_last.pt")
    assert {gate.unit for _, gate in encoder.named_gates()} == {"heads", "ffn", "rank"}


def test_a_run_of_an_earlier_version_says_why_it_cannot_go_on_and_what_can(
    speech: Path, teacher_file: Path, tmp_path: Path
) -> None:
    """Up to version 0.1 every vector of gates was a separate parameter."""
    overrides = (f"task.data={speech}", f"task.teacher={teacher_file}", "optimization.max_update=6")
    run = Run(tmp_path, *overrides).finish()
    state = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)
    encoder = load_encoder(tmp_path / "checkpoint_last.pt")
    parts = [(name, gate.part) for name, gate in encoder.named_gates()]
    model = state["model"]
    for kind in ("log_alpha", "kept_override"):
        flat = model.pop(f"speech_encoder.gates.{kind}")
        model.update({f"speech_encoder.{name}.{kind}": flat[part].clone() for name, part in parts})
    saved = state["last_optimizer_state"]["gates"]
    moments = saved["state"].pop(0)
    for index, (_, part) in enumerate(parts):
        saved["state"][index] = {
            k: v[part].clone() if torch.is_tensor(v) and v.dim() else v for k, v in moments.items()
        }
    saved["param_groups"][0]["params"] = list(range(len(parts)))
    torch.save(state, tmp_path / "checkpoint_last.pt")

    old = load_encoder(tmp_path / "checkpoint_last.pt")
    assert torch.equal(old.gates.log_alpha, encoder.gates.log_alpha)  # type: ignore[union-attr]
    assert run.start().wait() != [0]
    said = run.log()[-4000:]
    assert all(word in said for word in ("version 0.1", "checkpoint.reset_optimizer=true", "gates"))
    longer = Run(tmp_path, *overrides[:2], "optimization.max_update=8", "checkpoint.reset_optimizer=true").finish()
    assert longer.last_update() == 8


class RunsCode:
    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


def test_a_strangers_checkpoint_in_the_folder_runs_no_code(data: list[str], straight: Any, tmp_path: Path) -> None:
    checkpoint = load_torch_file(straight(1).folder / "checkpoint_last.pt", trust=True)
    checkpoint["extra_state"]["more"] = RunsCode(tmp_path / "made")
    run = Run(tmp_path / "run", *data, "optimization.max_update=41")
    torch.save(checkpoint, run.folder / "checkpoint_last.pt")
    assert run.start().wait() == [1]
    assert re.search(r"checkpoint_last\.pt.*posix\.mkdir", run.log())
    assert not (tmp_path / "made").exists()


def test_weights_at_fault_are_named(data: list[str], straight: Any, tmp_path: Path) -> None:
    checkpoint = load_torch_file(straight(1).folder / "checkpoint_last.pt", trust=True)
    name = "speech_encoder.transformer.layers.1.ffn.fc1.bias"
    checkpoint["model"][name][0] = float("nan")
    run = Run(tmp_path, *data, "optimization.max_update=50")
    torch.save(checkpoint, run.folder / "checkpoint_last.pt")
    assert run.start().wait() == [1]
    # In the first update with that unit's gate open, because closed units are not computed.
    assert re.search(rf"FloatingPointError: update 4\d: .*{name}.*NaN", run.log())
    assert "is skipped" not in run.log() and ".wav" not in run.log().split("FloatingPointError")[-1]
