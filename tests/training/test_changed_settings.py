"""A run directory reused with other settings: the log names them."""

from __future__ import annotations

import logging
import os
import re
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from disturbed import Run
from fairseq.dataclass.configs import FairseqConfig
from omegaconf import OmegaConf

from skill_fairseq.checkpoints import save_encoder
from skill_fairseq.files import content_sha256
from skill_fairseq.training.changed_settings import NOT_SET, changed_settings, saved_settings, warn_of_changes

CFG: dict[str, Any] = {
    "_name": None,
    "common": {"seed": 1, "fp16": False, "log_format": "json"},
    "criterion": {"_name": "skill_group_kd", "groups": [[0], [1, 2]], "target_sparsity": 0.75},
    "optimization": {"max_update": 400, "lr": [0.001]},
    "optimizer": {"groups": {"gates": {"lr_float": 0.15, "lr_scheduler": {"total_num_update": 400}}}},
    "checkpoint": {"save_dir": "here"},
}


def changed(cfg: dict[str, Any], **values: Any) -> dict[str, Any]:
    """A copy with other values, by dotted names with __ for the dot."""
    copy = OmegaConf.create(cfg)
    for name, value in values.items():
        OmegaConf.update(copy, name.replace("__", "."), value)
    return OmegaConf.to_container(copy)  # type: ignore[return-value]


def test_fields_with_other_values_are_found() -> None:
    now = changed(CFG, common__fp16=True, criterion__groups=[[0, 1], [2]], optimizer__groups__gates__lr_float=0.2)
    now["task"] = {"crop_multiple": 4000}
    del now["common"]["seed"]
    assert changed_settings(CFG, now) == {
        "common.fp16": (False, True),
        "common.seed": (1, NOT_SET),
        "criterion.groups": ([[0], [1, 2]], [[0, 1], [2]]),
        "optimizer.groups.gates.lr_float": (0.15, 0.2),
        "task.crop_multiple": (NOT_SET, 4000),
    }
    assert changed_settings(CFG, CFG) == changed_settings({}, CFG) == {}


def test_what_changes_in_the_ordinary_way_is_not() -> None:
    """A longer run, schedules that depend on its length, another folder or log."""
    length = {"optimization__max_update": 500, "optimizer__groups__gates__lr_scheduler__total_num_update": 500}
    now = changed(CFG, common__log_format="simple", checkpoint__save_dir="there", **length)
    assert changed_settings(CFG, now) == {}
    alone = changed(CFG, optimizer__groups__gates__lr_scheduler__total_num_update=500)
    assert changed_settings(CFG, alone) == {"optimizer.groups.gates.lr_scheduler.total_num_update": (400, 500)}


def test_the_number_of_ranks_is_not_wherever_fairseq_repeats_it() -> None:
    def resolved(*overrides: str) -> Any:
        cfg = OmegaConf.merge(OmegaConf.structured(FairseqConfig), OmegaConf.from_dotlist(list(overrides)))
        return OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)

    ranks = ["distributed_training.distributed_world_size=4", "distributed_training.ddp_backend=legacy_ddp"]
    before, now = resolved(), resolved(*ranks, "dataset.data_buffer_size=3", "common.fp16=true")
    assert now["bmuf"]["distributed_world_size"] == 4 != before["bmuf"]["distributed_world_size"]
    for cfg in (before, now):  # as in the criterion adaptive_loss and fine-tuned models
        cfg["criterion"] = {"ddp_backend": cfg["distributed_training"]["ddp_backend"]}
    assert changed_settings(before, now) == {"common.fp16": (False, True)}


class Strange:
    """Unpickling it runs its code."""

    def __reduce__(self) -> Any:
        return (os.mkdir, ("strange",))


def test_a_checkpoints_config_is_read_and_no_code_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = {"model": torch.nn.Linear(3, 3).state_dict(), "args": Namespace(lr=1), "cfg": CFG}
    torch.save(state, "checkpoint.pt")
    assert saved_settings(Path("checkpoint.pt")) == CFG
    torch.save({**state, "cfg": {**CFG, "model": Namespace(dropout=0.1)}}, "namespace.pt")
    assert changed_settings(saved_settings(Path("namespace.pt")), CFG) == {}
    torch.save({**state, "strange": {Strange(): 1}}, "strange.pt")
    assert saved_settings(Path("strange.pt")) == {}
    assert not Path("strange").exists()


@pytest.mark.parametrize(
    "content",
    [{"args": Namespace(lr=1), "cfg": None, "model": {}}, {"model": {}}, {"cfg": OmegaConf.create(CFG)}, 3, None],
)
def test_what_cannot_be_compared_is_passed_over(tmp_path: Path, content: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Old, foreign and missing checkpoints, and the format before torch 1.6."""
    path = tmp_path / "checkpoint_last.pt"
    for new_format in (True, False):
        if content is not None:
            torch.save(content, path, _use_new_zipfile_serialization=new_format)
        warn_of_changes(path, CFG)
    assert not caplog.records


def test_the_warning_has_an_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "checkpoint_last.pt"
    torch.save({"cfg": {"task": {f"field{i:02}": "x" * 100 for i in range(14)}}}, path)
    with caplog.at_level(logging.WARNING):
        warn_of_changes(path, {"task": {f"field{i:02}": i for i in range(14)}})
    (record,) = caplog.records
    cut = "'" + "x" * 56 + "..."
    assert all(f"task.field0{i}: {cut} -> {i}," in record.message for i in range(10))
    assert "field10" not in record.message and "4 more" in record.message


@pytest.mark.faults(
    "a run directory is used again with other settings",
    "the run resumes from its checkpoint; one warning names the fields with old and new values",
)
@pytest.mark.faults(
    "a run resumes with another teacher under the same name",
    "a warning names the file and both hashes of its content",
)
@pytest.mark.slow
def test_a_run_that_goes_on_names_what_has_changed(
    data: list[str], teacher_file: Path, small: Any, tmp_path: Path
) -> None:
    own = shutil.copy(teacher_file, tmp_path / "teacher.safetensors")
    data = [data[0], f"task.teacher={own}"]
    short = ["optimization.max_update=6", "checkpoint.save_interval_updates=3"]
    Run(tmp_path, *data, *short).finish()
    longer = Run(tmp_path, *data, "optimization.max_update=8", "dataset.num_workers=1").finish()
    assert longer.last_update() == 8 and "settings have changed" not in longer.log()
    assert "another teacher" not in longer.log()

    save_encoder(small.random_encoder(seed=1), own)
    others = ["optimization.max_update=10", "optimizer.groups.gates.lr_float=0.2", "+task.num_batch_buckets=2"]
    run = Run(tmp_path, *data, *others, world_size=2).finish()
    (line,) = [line for line in run.log().splitlines() if "settings have changed" in line]
    assert re.findall(r"[\w.]+: \S+ -> [\w.]*\w", line) == [
        "optimizer.groups.gates.lr_float: 0.1 -> 0.2",
        "task.num_batch_buckets: 0 -> 2",
    ]
    assert "hydra.run.dir" in line
    assert "settings have changed" not in run.log(1) and run.last_update() == 10
    (line,) = [line for line in run.log().splitlines() if "another teacher" in line]
    assert str(own) in line and content_sha256(own) in line and content_sha256(teacher_file) in line
    assert "another teacher" not in run.log(1)

    start = f"checkpoint.finetune_from_model={tmp_path / 'checkpoint_last.pt'}"
    new = Run(tmp_path / "new", *data, *others, start, "criterion.target_sparsity=0.6").finish()
    assert "loading pretrained model" in new.log() and "settings have changed" not in new.log()
