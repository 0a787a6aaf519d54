"""Stage 2 in int8: killed and resumed, by two processes, in bfloat16, and with batches that are accumulated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from disturbed import LOGGED, Run, same_outcome
from torch import Tensor

from skill_fairseq.checkpoints import load_encoder
from skill_fairseq.modules.fake_quantize import BOUNDS, Ranges

SETTINGS = [
    *LOGGED,
    "dataset.max_tokens=40000",
    "dataset.disable_validation=true",
    "checkpoint.save_interval_updates=2",
    "criterion.groups=[[0],[1,2],[3]]",
    "criterion.init_from=null",
    "model.init_from=${task.teacher}",
    "optimization.max_update=6",
]
RANDOM = [
    *("task.max_sample_size=9000", "task.crop_multiple=1"),
    *("model.dropout=0.1", "model.attention_dropout=0.1", "+model.encoder_layerdrop=0.2"),
]
CONFIG = ("final", "tiny_int8", SETTINGS)
pytestmark = pytest.mark.slow


def ranges(run: Run) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in run.checkpoint()["model"].items() if name.endswith(BOUNDS)}


@pytest.mark.parametrize(
    ("world_size", "more"),
    [
        (1, []),
        pytest.param(2, ["common.bf16=true", "optimization.update_freq=[2]"], marks=pytest.mark.nightly),
    ],
    ids=["one process", "two in bf16"],
)
def test_a_kill_changes_nothing(data: list[str], tmp_path: Path, world_size: int, more: list[str]) -> None:
    """Weights, moments and ranges are the same bits; the student loads, rounds, and is near its teacher."""
    again = ["+model.checkpoint_activations=true", *more]
    straight, killed = (
        Run(tmp_path / name, *data, *RANDOM, *again, config=CONFIG, world_size=world_size) for name in ("a", "b")
    )
    straight.finish()
    killed.start()
    killed.wait_for(lambda: killed.last_update() >= 3)
    killed.kill()
    killed.finish()
    assert "Loaded checkpoint" in killed.log()
    same_outcome(killed, straight)
    found = ranges(straight)
    assert found and all(bounds.dtype == torch.float32 and bounds[1] > bounds[0] for bounds in found.values())
    assert straight.checkpoint()["cfg"]["model"]["quantize"] == "int8"
    student = load_encoder(tmp_path / "a" / "checkpoint_last.pt")
    assert student.config.quantize == "int8" and len(Ranges(student).ranges) == len(found)


def test_two_processes_find_the_ranges_of_one(small: Any, teacher_file: Path, tmp_path: Path) -> None:
    """One update of one batch, and of its halves in two processes."""
    audio = small.write_speech(tmp_path / "audio", {"train": [0.5] * 8, "valid": [0.5]})
    where = [f"task.data={audio}", f"task.teacher={teacher_file}", "optimization.max_update=1"]
    found = []
    for processes in (1, 2):
        tokens = f"dataset.max_tokens={8 * 8000 // processes}"
        run = Run(tmp_path / str(processes), *where, tokens, config=CONFIG, world_size=processes).finish()
        found.append(ranges(run))
    one, two = found
    for name, bounds in one.items():
        torch.testing.assert_close(two[name], bounds, rtol=0.05, atol=1e-4, msg=name)
    # What the first rounding hears is no matter of other rounding, which follows each batch in the first update.
    first = "speech_encoder.feature_projection.linear.input_range.bounds"
    torch.testing.assert_close(two[first], one[first], rtol=1e-6, atol=1e-7)
