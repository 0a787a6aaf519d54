"""Resolves paths of a config relative to the folder where the command was started."""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import to_absolute_path

from skill_fairseq.checkpoints.hub import is_hub_name, local_copy


def from_shell(path: Any) -> Any:
    """Makes a path, or each of a list, absolute. Relative paths start where the command was started, because hydra has
    since changed to the run's folder; a hub repository (`hf://user/repo`) becomes its local copy.

    fairseq starts a process for each GPU of a node, which knows where its parent was started, but not hydra.
    """
    if isinstance(path, Sequence) and not isinstance(path, str):
        return [from_shell(each) for each in path]
    if is_hub_name(path):
        return str(local_copy(path))
    expanded = Path(str(path)).expanduser()  # YAML reads a name of digits as a number
    if not HydraConfig.initialized() and multiprocessing.parent_process() is not None:
        started: str = multiprocessing.process.ORIGINAL_DIR  # type: ignore[attr-defined]
        return str(Path(started) / expanded)
    return to_absolute_path(str(expanded))
