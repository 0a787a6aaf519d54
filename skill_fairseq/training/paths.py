"""Paths of a config, which mean what they mean in the shell that the command was typed in."""

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
    """The path, or each of a list, absolute: relative to where the command was started, for hydra has changed into the
    run's folder since; of a repository of the hub (`hf://user/repo`) the local copy.

    fairseq starts a process for each GPU of a node, which knows nothing of hydra, but where its parent was started.
    """
    if isinstance(path, Sequence) and not isinstance(path, str):
        return [from_shell(each) for each in path]
    if is_hub_name(path):
        return str(local_copy(path))
    expanded = Path(str(path)).expanduser()  # a name of digits is a number to YAML
    if not HydraConfig.initialized() and multiprocessing.parent_process() is not None:
        started: str = multiprocessing.process.ORIGINAL_DIR  # type: ignore[attr-defined]
        return str(Path(started) / expanded)
    return to_absolute_path(str(expanded))
