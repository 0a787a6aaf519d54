"""What has changed between the settings that a checkpoint was made with and those of the run that goes on from it."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

from skill_fairseq.checkpoints.unpickling import read

logger = logging.getLogger(__name__)

ORDINARY = (
    "job_logging_cfg.*",
    "common.log_*",
    "common.no_progress_bar",
    "common.tensorboard_logdir",
    "common.user_dir",
    "common.wandb_project",
    "checkpoint.*",
    "dataset.data_buffer_size",
    "dataset.num_workers",
    "dataset.validate_*",
    "distributed_training.*",
    "*.distributed_world_size",  # these three repeat a field above
    "*.ddp_backend",
    "*.data_buffer_size",
    "optimization.max_epoch",
    "optimization.max_update",
    "optimization.stop_time_hours",
    "task.max_skipped_updates",
    "task.max_unreadable_files",
)
"""Fields that change without a word: where, how often and on how many processes, how long, and what is tolerated."""

NOT_SET = "not set"
_MOST = 10  # fields that are named
_LENGTH = 60  # of a value's text


def warn_of_changes(checkpoint: Path, cfg: Mapping[str, Any]) -> None:
    """Logs one warning that names the fields whose values differ from the checkpoint's; none if there are none.

    Args:
        checkpoint: fairseq's file; silence if it is missing or holds no config that can be compared.
        cfg: config of the present run, plain.
    """
    changes = changed_settings(saved_settings(checkpoint), cfg)
    if not changes:
        return
    named = [f"{name}: {_short(old)} -> {_short(new)}" for name, (old, new) in list(changes.items())[:_MOST]]
    more = f", and {len(changes) - _MOST} more" if len(changes) > _MOST else ""
    logger.warning(
        f"settings have changed since {checkpoint} was written, and the run goes on from it: {', '.join(named)}{more}. "
        "To start from the beginning, give it another hydra.run.dir"
    )


def warn_of_another_teacher(checkpoint: str, before: Optional[str], now: Optional[str], task: Any) -> None:
    """Logs a warning where a run goes on with a teacher of other content.

    Args:
        checkpoint: fairseq's file.
        before: SHA-256 that it holds; None in those of earlier versions and of tasks without a teacher.
        now: SHA-256 of the teacher of the present run.
        task: config of the task.
    """
    if before is not None and before != now:
        logger.warning(
            f"another teacher: task.teacher={getattr(task, 'teacher', None)} has the SHA-256 {now}, that of "
            f"{checkpoint} had {before}. The run goes on with it; to start from the beginning, give it another "
            "hydra.run.dir"
        )


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> Dict[str, Tuple[Any, Any]]:
    """Fields with other values now, by dotted name: old and new, :data:`NOT_SET` where one side has none.

    :data:`ORDINARY` ones are left out, and those that follow ``optimization.max_update``, as schedules do.

    Args:
        before: plain nested config; empty if there is nothing to compare.
        now: the same of the present run.
    """
    old, new = _leaves(before), _leaves(now)
    if not old:
        return {}
    length = tuple(side.get("optimization.max_update") for side in (old, new))
    changes = {}
    for name in sorted({*old, *new}):
        pair = (old.get(name, NOT_SET), new.get(name, NOT_SET))
        ordinary = any(fnmatch.fnmatchcase(name, pattern) for pattern in ORDINARY) or pair == length
        if pair[0] != pair[1] and not ordinary:
            changes[name] = pair
    return changes


def saved_settings(checkpoint: Path) -> Dict[str, Any]:
    """The config in fairseq's checkpoint, without reading a tensor or running code of the file.

    Returns:
        a nested dictionary; empty where the file is missing, of another format, has no plain config, or holds objects
        that are not read.
    """
    try:
        with open(checkpoint, "rb") as file:
            cfg = read(file, tensors=False)["cfg"]
    except Exception:  # damaged pickles raise nearly anything; whether the file is of use is fairseq's affair
        return {}
    return cfg if isinstance(cfg, dict) else {}


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Dict[str, Any]:
    found: Dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found.update(_leaves(value, f"{prefix}{key}."))
        elif value is None or isinstance(value, (str, int, float, list, tuple)):
            found[f"{prefix}{key}"] = value
    return found


def _short(value: Any) -> str:
    text = value if value is NOT_SET else repr(value)
    return text if len(text) <= _LENGTH else text[: _LENGTH - 3] + "..."
