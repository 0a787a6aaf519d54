"""The folder of a run and of a benchmark, with real parts except for the training log, which is written here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from skill_fairseq.checkpoints import load_encoder, save_encoder
from skill_fairseq.cli import cluster
from skill_fairseq.comparison.layer_distance import KINDS
from skill_fairseq.comparison.summary import summarise
from skill_fairseq.probing.intervals import wilson
from skill_fairseq.pruning.magnitude import prune_by_magnitude

STAGE_1 = [
    # update, loss, expected, target
    (10, -0.5123, 0.0123, 0.2),
    (20, -0.6234, 0.3456, 0.4),
    (30, -0.7345, 0.4987, 0.5),
]
STAGE_2 = [(10, -0.7777, None, None), (20, -0.8888, None, None)]
VALID = [(20, -0.6543)]
PROBES = [
    ("teacher", 24210, "digit", 0.827, (0.78, 0.865), 248, 300),
    ("student", 12105, "digit", 0.8367, (0.791, 0.874), 251, 300),
    ("logmel", None, "digit", 0.4933, (0.437, 0.55), 148, 300),
]
SPEAKERS = [f"s{i // 25}" for i in range(200)]


def write_log(folder: Path, points: list, valid: list, form: str) -> None:
    """``hydra_train.log`` in fairseq's log_format simple or json."""
    lines = []
    for update, loss, expected, target in points:
        values = {"distillation_loss": loss, "l1_g0": 0.1, "l1_g1": 0.2}
        if expected is not None:
            values.update(expected_sparsity=expected, target_sparsity=target)
        values.update(num_updates=update, gnorm=1.5, wall=update // 5)
        if form == "json":
            said = json.dumps({"epoch": 1, **{name: str(value) for name, value in values.items()}})
        else:
            said = f"epoch 001: {update} / 24 " + ", ".join(f"{name}={value}" for name, value in values.items())
        lines.append(f"[2026-01-01 00:00:00,000][train_inner][INFO] - {said}")
    for update, loss in valid:
        lines.append(
            "[2026-01-01 00:00:00,000][valid][INFO] - epoch 001 | valid on 'valid' subset | "
            f"distillation_loss {loss} | num_updates {update}"
        )
    folder.mkdir()
    (folder / "hydra_train.log").write_text("\n".join(lines) + "\n")


def write_hydra(folder: Path, config: dict[str, Any], overrides: list[str]) -> None:
    """``.hydra/`` as hydra writes it."""
    (folder / ".hydra").mkdir()
    hydra = {"job": {"config_name": "tiny"}, "overrides": {"hydra": ["hydra.run.dir=stage1"], "task": overrides}}
    for name, content in {"config": config, "overrides": overrides, "hydra": {"hydra": hydra}}.items():
        (folder / ".hydra" / f"{name}.yaml").write_text(yaml.safe_dump(content))


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory, teacher_file: Path, speech: Path) -> Path:
    """Everything that a report shows of a run."""
    path = tmp_path_factory.mktemp("report") / "run"
    path.mkdir()
    manifest = ["--manifest", str(speech / "train.tsv"), "--num-groups", "2"]
    assert cluster.main(["--teacher", str(teacher_file), *manifest, "--out", str(path / "clusters")]) == 0
    write_log(path / "stage1", STAGE_1, VALID, "simple")
    config = {"task": {"teacher": str(teacher_file), "data": str(speech)}, "common": {"seed": 4711}}
    write_hydra(path / "stage1", config, ["common.seed=4711", "criterion.groups=[[0],[1,2]]"])
    write_log(path / "stage2", STAGE_2, [], "json")
    teacher = load_encoder(teacher_file)
    for name, sparsity in (("shrunk", 0.4), ("student", 0.5)):
        small = prune_by_magnitude(teacher, sparsity, ["conv", "heads", "ffn"])
        save_encoder(small, path / f"{name}.safetensors", {"by": name, "sparsity": {"asked": sparsity}})
    results = [
        {
            **{"model": model, "parameters": parameters, "task": task, "metric": "accuracy", "value": value},
            **{"interval": interval, "correct": correct, "total": total, "classes": 10},
        }
        for model, parameters, task, value, interval, correct, total in PROBES
    ]
    (path / "probe.json").write_text(json.dumps({"seed": 0, "results": results}))
    return path


def benchmark_results() -> list[dict[str, Any]]:
    """Three methods, two sparsities, three seeds."""
    found = []
    accuracy = {"skill": 0.9, "dphubert": 0.7, "a_method_with_quite_a_long_name": 0.7}
    for number, (method, rate) in enumerate(accuracy.items()):
        for sparsity in (0.5, 0.75):
            for seed in (1, 2, 3):
                rng = np.random.default_rng([number, int(100 * sparsity), seed])
                right = "".join(map(str, (rng.random(200) < rate).astype(int)))
                found.append(
                    {
                        **{"method": method, "sparsity": sparsity, "seed": seed, "groups": [[0], list(range(1, 13))]},
                        "probes": {
                            "digit": {
                                **{"metric": "accuracy", "samples": "200 recordings", "right": right},
                                **{"speakers": SPEAKERS, "interval": (0, 1), "no_interval": None},
                            }
                        },
                        "distances": {
                            "layers": {kind: rng.random(13).tolist() for kind in KINDS},
                            "recordings": {kind: rng.random(20).tolist() for kind in KINDS},
                            "speakers": SPEAKERS[::10],
                        },
                        "costs": {"parameters": 252_411, "macs": 368_387_399, "cpu_seconds": 0.0214},
                        "made": {
                            "sparsity": {"expected": sparsity, "actual": sparsity},
                            "seconds": {"stage1": 69.0, "stage2": 22.0, "measure": 11.0},
                        },
                        "versions": {"torch": "2.13.0"},
                    }
                )
    return found


@pytest.fixture(scope="session")
def benchmark_folder(tmp_path_factory: pytest.TempPathFactory, run_folder: Path) -> Path:
    """Like the output of examples/benchmark/run.py, with one run missing and one failed."""
    path = tmp_path_factory.mktemp("report") / "benchmark"
    path.mkdir()
    (path / "clusters").symlink_to(run_folder / "clusters")
    teacher = {
        "probes": {"digit": {"metric": "accuracy", "value": 0.8, "interval": wilson(160, 200)}},
        "costs": {"parameters": 1_009_948, "macs": 1_117_000_000, "cpu_seconds": 0.052},
    }
    summary = summarise(benchmark_results(), {"teacher": teacher}, "dphubert")
    summary.update(wanted=20, found=18, failed=["skill-0.875-1"], settings={"stage1": {"config": "distill/tiny"}})
    (path / "results.json").write_text(json.dumps(summary))
    return path
