"""A run that resumes in an epoch that now has other batches."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from disturbed import Run
from fairseq.data.iterators import EpochBatchIterator
from messages import says
from torch.utils.data import TensorDataset

from skill_fairseq.training.epoch_batches import KEY, fingerprint, skips_to_next_epoch

BATCHES = [[0, 1], [2], [3, 4, 5]]


def iterator(batches: Any = BATCHES, **changes: Any) -> EpochBatchIterator:
    return EpochBatchIterator(TensorDataset(), lambda samples: samples, batches, **{"seed": 1, **changes})


def state(done: int, saved: Any = None) -> dict[str, Any]:
    place = {"version": 2, "epoch": 3, "iterations_in_epoch": done, "shuffle": True}
    return {"train_iterator": place, **({} if saved is None else {KEY: fingerprint(saved)})}


@pytest.mark.parametrize(
    "other",
    [
        iterator([[0, 1], [2], [3, 4], [5]]),  # as many files, or more
        iterator([[0, 1, 2], [3, 4, 5]]),
        iterator([[0], [1, 2], [3, 4, 5]]),  # as many batches
        iterator(seed=2),
        iterator(num_shards=2),
    ],
)
def test_other_batches_are_told_from_the_same(other: Any, caplog: pytest.LogCaptureFixture) -> None:
    same = iterator([np.array(batch) for batch in BATCHES])
    assert not skips_to_next_epoch(state(2, iterator()), same) and not caplog.records
    assert not skips_to_next_epoch(state(0, iterator()), other)  # the epoch has not started
    found = state(2, iterator())
    with caplog.at_level(logging.WARNING):
        assert skips_to_next_epoch(found, other)
    assert found["train_iterator"] == {"version": 2, "epoch": 4, "iterations_in_epoch": 0, "shuffle": True}
    (record,) = caplog.records
    assert "epoch 3" in record.message and "epoch 4" in record.message and "dataset.max_tokens" in record.message


def test_checkpoints_of_earlier_versions_know_how_far_they_were() -> None:
    assert not skips_to_next_epoch(state(2), iterator())
    assert skips_to_next_epoch(state(3), iterator())


@pytest.mark.faults(
    "a run resumes with other files, dataset.max_tokens or number of processes",
    "it continues with the next epoch; a warning says so",
)
@pytest.mark.slow
def test_a_run_goes_on_with_the_next_epoch(data: list[str], speech: Path, tmp_path: Path) -> None:
    short = ["dataset.max_tokens=9000", "dataset.disable_validation=true", "checkpoint.save_interval_updates=100"]
    first = Run(tmp_path / "first", *data, *short, "optimization.max_update=8").finish()
    assert {entry["epoch"] for entry in first.updates().values()} == {1}
    fewer = shutil.copytree(speech, tmp_path / "fewer")
    (fewer / "train.tsv").write_text("".join((speech / "train.tsv").read_text().splitlines(keepends=True)[:21]))
    for name, changes, world_size in (
        ("larger", ["dataset.max_tokens=60000"], 1),  # fewer batches than were made
        ("ranks", [], 2),
        ("manifest", [f"task.data={fewer}"], 1),
    ):
        shutil.copytree(tmp_path / "first", tmp_path / name)
        run = Run(tmp_path / name, *data, *short, *changes, "optimization.max_update=10", world_size=world_size)
        run.finish()
        assert [run.updates()[update]["epoch"] for update in (8, 9, 10)] == [1, 2, 2], name
        (line,) = [line for line in run.log().splitlines() if "other batches" in line]
        assert re.search(says("epoch 1", 8, "epoch 2"), line), name
