"""Compares a checkpoint's settings with those of the run that resumes from it."""

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
    "*.distributed_world_size",  # these three duplicate a field above
    "*.ddp_backend",
    "*.data_buffer_size",
    "optimization.max_epoch",
    "optimization.max_update",
    "optimization.stop_time_hours",
    "task.max_skipped_updates",
    "task.max_unreadable_files",
)
"""Fields that may change without a warning: places, intervals, processes, lengths and tolerances."""

NOT_SET = "not set"
_MOST = 10  # fields to name
_LENGTH = 60  # characters of a value


def warn_of_changes(checkpoint: Path, cfg: Mapping[str, Any]) -> None:
    """Logs a warning that names the fields whose values differ from the checkpoint's, if there are any.

    Args:
        checkpoint: fairseq's file; no warning if it is missing or has no comparable config.
        cfg: the current run's config, plain.
    """
    changes = changed_settings(saved_settings(checkpoint), cfg)
    if not changes:
        return
    named = [f"{name}: {_short(old)} -> {_short(new)}" for name, (old, new) in list(changes.items())[:_MOST]]
    more = f", and {len(changes) - _MOST} more" if len(changes) > _MOST else ""
    logger.warning(
        f"settings have changed since {checkpoint} was written, and the run resumes from it: {', '.join(named)}{more}. "
        "To start from the beginning, set another hydra.run.dir"
    )


def warn_of_another_teacher(checkpoint: str, before: Optional[str], now: Optional[str], task: Any) -> None:
    """Logs a warning if a run resumes with a teacher of other content.

    Args:
        checkpoint: fairseq's file.
        before: the SHA-256 that it holds; None in those of earlier versions and of tasks without a teacher.
        now: SHA-256 of the current run's teacher.
        task: the task's config.
    """
    if before is not None and before != now:
        logger.warning(
            f"another teacher: task.teacher={getattr(task, 'teacher', None)} has the SHA-256 {now}, that of "
            f"{checkpoint} had {before}. The run resumes with it; to start from the beginning, set another "
            "hydra.run.dir"
        )


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> Dict[str, Tuple[Any, Any]]:
    """Changed fields by dotted name: old and new value, :data:`NOT_SET` where one side has none.

    Leaves out :data:`ORDINARY` fields, and those that follow ``optimization.max_update``, such as schedules.

    Args:
        before: plain nested config; empty if there is nothing to compare.
        now: the same for the current run.
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
    """Reads the config in a fairseq checkpoint, without reading tensors or running the file's code.

    Returns:
        a nested dictionary; empty if the file is missing, has another format or no plain config, or holds objects of
        unknown classes.
    """
    try:
        with open(checkpoint, "rb") as file:
            cfg = read(file, tensors=False)["cfg"]
    except Exception:  # damaged pickles raise almost anything; fairseq decides whether the file is usable
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
