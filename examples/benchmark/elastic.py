"""Students of an elastic run, which is trained once per seed and cut to each sparsity."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import Any

# beside this file
from grid import Grid, Run
from student import common_overrides, in_log, train

from skill_fairseq import load_encoder
from skill_fairseq.checkpoints.load import read_source
from skill_fairseq.cli import shrink
from skill_fairseq.clustering.config_file import format_groups

FIELD = "criterion.elastic="
"""Beginning of the override that marks a variant as elastic."""


def is_elastic(run: Run) -> bool:
    """Whether a run's student is cut from an elastic run."""
    return any(word.lstrip("+").startswith(FIELD) for word in run.target.stage1)


def make_elastic(run: Run, grid: Grid, folder: Path, configs: Path) -> dict[str, Any]:
    """Cuts student.safetensors in the run's folder from the elastic run of its seed, which is trained if necessary.

    Args, Returns: see :func:`student.make_student`; the processor time is that of the whole elastic run.
    """
    shared, student = folder.parent.parent / "elastic" / f"{run.method}-{run.seed}", folder / "student.safetensors"
    shared.mkdir(parents=True, exist_ok=True)
    common = [
        *common_overrides(run, grid, load_encoder(grid.teacher)),
        f"criterion.groups={format_groups(run.target.groups or [], ',')}",
        f"criterion.projection_sharing={str(run.target.projection_sharing).replace(' ', '')}",
    ]
    with open(shared / "lock", "w", encoding="utf-8") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stage1 = train(
            shared / "stage1",
            configs / grid.stage1["config"],
            [*grid.overrides("stage1"), *common, "criterion.target_sparsity=null", *run.target.stage1],
        )
        init = f"model.init_from={shared / 'stage1' / 'checkpoint_last.pt'}"
        stage2 = train(
            shared / "stage2",
            configs / grid.stage2["config"],
            [*grid.overrides("stage2"), *common, init, *run.target.stage2],
        )
    last = shared / "stage2" / "checkpoint_last.pt"
    in_log(shrink.main, [str(last), str(student), "--size", f"{1 - run.sparsity:.6g}"], folder / "log")
    return {
        "sparsity": dict(read_source(student).provenance["sparsity"]),
        "seconds": {"stage1": stage1["seconds"], "stage2": stage2["seconds"]},
        "cpu_seconds": stage1["cpu_seconds"] + stage2["cpu_seconds"],
        "attempts": {"stage1": stage1["attempts"], "stage2": stage2["attempts"]},
    }
