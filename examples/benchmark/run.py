#!/usr/bin/env python3
"""Compares distillation methods, in one command that can be interrupted and repeated."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # such a small model loses time with threads

# beside this file
from elastic import is_elastic, make_elastic
from grid import (
    STAGES,
    Grid,
    Run,
    changed_setting,
    composed,
    extended,
    owner,
    read_grid,
    recipe_overrides,
    runs_of,
    settings_of,
    then_overrides,
)
from methods import METHODS
from recipes import make_by_recipe, why_unreachable
from runs_table import write_runs
from student import in_log, make_student

from skill_fairseq import load_encoder
from skill_fairseq.audio.manifest import check_manifest, read_manifest
from skill_fairseq.cli import cluster
from skill_fairseq.cli._common import Parser, in_range, seed
from skill_fairseq.cli._common import run as reporting_errors
from skill_fairseq.comparison.costs import costs
from skill_fairseq.comparison.layer_distance import layer_distances
from skill_fairseq.comparison.summary import summarise
from skill_fairseq.comparison.table import write_tables
from skill_fairseq.files import content_sha256, read_json, sha256, write_file, write_json
from skill_fairseq.probing.evaluate import evaluate, require_scikit_learn
from skill_fairseq.probing.models import level_free_log_mel
from skill_fairseq.probing.pooling import EncoderFeatures
from skill_fairseq.probing.tasks import read_speakers, read_task
from skill_fairseq.text_tables import aligned
from skill_fairseq.versions import versions

HERE = Path(__file__).resolve().parent
CONFIG = HERE.parents[1] / "config"
STOPPED = 130
"""Exit code of a command, or one of its runs, that a signal or Ctrl-C stopped."""
EPILOG = """examples:
  python examples/benchmark/run.py                               the reduced grid, two runs at a time
  python examples/benchmark/run.py out --name full               every method, examples/tiny's own numbers of updates
  python examples/benchmark/run.py out --name trial              a test: two methods, a few updates
  python examples/benchmark/run.py choices --name choices        the comparisons behind the defaults
  python examples/benchmark/run.py family --name family          related systems, at equal size
  python examples/benchmark/run.py elastic --name elastic        all sizes from one run, and a run for each size
  python examples/benchmark/run.py out --methods skill dphubert --seeds 1 2 3 4 5
  python examples/benchmark/run.py out --table                   only tabulate existing results
  python examples/benchmark/run.py out --run skill-0.75-1        one run, for job arrays
  python examples/benchmark/run.py out --grid mine.yaml --name wavlm_base_plus --teacher WavLM-Base+.pt --data manifests

Finished parts are kept: the same command resumes, also inside a run. OUT gets clusters/,
references.json, runs/METHOD-SPARSITY-SEED/ (logs, student.safetensors, result.json), results.json, runs.csv and
table.md.
Needs skill_fairseq with the extra for probes: pip install '.[probe,plots]'.
"""


class Stopped(BaseException):
    """A signal asked the process to stop."""


def probe_tasks(encoder_file: Path, folders: Sequence[Path]) -> dict[str, Any]:
    """A student's results in each task."""
    tasks = [read_task(folder) for folder in folders]
    return evaluate(EncoderFeatures(load_encoder(encoder_file)), tasks, encoder_file.stem)


def not_probed(file: Path, grid: Grid) -> list[Path]:
    """Tasks of the grid that a result lacks; all of them if there is no result."""
    done = read_json(file)["probes"] if file.is_file() else {}
    return [folder for folder in grid.tasks if folder.name not in done]


def measure(encoder_file: Path, grid: Grid) -> dict[str, Any]:
    """Everything except training: probes, distances to the teacher, costs."""
    encoder, teacher = load_encoder(encoder_file), load_encoder(grid.teacher)
    manifest = read_manifest(grid.data / "valid.tsv")
    check_manifest(manifest)
    distances = layer_distances(encoder, teacher, manifest.files)
    speakers = read_speakers(manifest)
    return {
        "probes": probe_tasks(encoder_file, grid.tasks),
        "distances": {
            "layers": distances.layers,
            "recordings": distances.recordings,
            "speakers": speakers,
            "frames": distances.num_frames,
            "teacher_layers": distances.teacher_layers,
        },
        "costs": costs(encoder),
    }


def do_run(run: Run, grid: Grid, out: Path, configs: dict[str, Any], keep_checkpoints: bool) -> None:
    """Makes and measures a student, unless done already. Writes the result last; tasks may be added to it."""
    folder = out / "runs" / run.name
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder / "lock"):
        file = folder / "result.json"
        if file.is_file():
            more = not_probed(file, grid)
            if more:
                result = read_json(file)
                result["probes"].update(probe_tasks(folder / "student.safetensors", more))
                write_json(file, result)
            return
        write_json(folder / "target.json", run.target.to_dict())
        began = time.monotonic()
        if run.target.recipe:
            made = make_by_recipe(run, grid, folder, CONFIG, configs)
        elif is_elastic(run):
            made = make_elastic(run, grid, folder, CONFIG)
        else:
            made = make_student(run, grid, folder, CONFIG)
        measuring = time.monotonic()
        measured = measure(folder / "student.safetensors", grid)
        made["seconds"]["measure"] = time.monotonic() - measuring
        write_json(
            file,
            {
                "method": run.method,
                "sparsity": run.sparsity,
                "seed": run.seed,
                "budget": grid.budget,
                **run.target.to_dict(),
                "made": made,
                "wall_seconds_of_last_attempt": time.monotonic() - began,
                **measured,
                "versions": versions("scikit-learn", "fairseq"),
                "cpu": cpu_model(),
                "commit": commit(),
            },
        )
        if not keep_checkpoints:
            for stage in ("stage1", "stage2"):
                for checkpoint in (folder / stage).glob("checkpoint*.pt"):
                    checkpoint.unlink()


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Holds a lock file.

    Raises:
        ValueError: another process holds it.
    """
    with open(path, "w", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"{path.parent}: another process is using it; wait for it, or stop it") from error
        yield


def cpu_model() -> str:
    """The processor's name in /proc/cpuinfo."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The repository's commit, with "+" if files have changed since; None outside of git."""
    try:
        found = [
            subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return found[0] + "+" * bool(found[1])


def prepare(grid: Grid, out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Checks that OUT belongs to these settings and clusters the teacher; returns clusters.json, and configs by stage
    and, under "recipes", by method."""
    tasks = [read_task(folder) for folder in grid.tasks]
    require_scikit_learn(tasks)
    names = ["train.tsv", "valid.tsv", "valid.speakers.tsv", "train.labels.tsv"]
    hashes = {
        "teacher": content_sha256(grid.teacher),
        "data": {name: sha256(grid.data / name) for name in names if (grid.data / name).is_file()},
        "tasks": {task.name: task.hashes for task in tasks},
    }
    configs = {stage: composed(CONFIG, getattr(grid, stage)["config"], grid.overrides(stage)) for stage in STAGES}
    equal = recipe_overrides(configs)
    configs["recipes"] = {
        name: composed(CONFIG, recipe.config, [*equal, *recipe.overrides])
        for name, recipe in grid.recipes.items()
        if name in grid.methods
    }
    for name, recipe in grid.recipes.items():
        if recipe.then and name in grid.methods:
            configs["recipes"][f"{name}, then"] = composed(CONFIG, recipe.then, then_overrides(configs))
    package = {name: found for name, found in versions("fairseq").items() if name in ("skill_fairseq", "fairseq")}
    settings, file = settings_of(grid, hashes, configs, package), out / "settings.json"
    found = read_json(file) if file.is_file() else {}
    if found:
        changed = changed_setting(extended(found, settings), extended(settings, found))
        if changed:
            name, before, now = changed
            raise ValueError(
                f"{file}: {name} is {before!r}, now {now!r}; runs with different settings cannot be compared: give "
                "another OUT, or the previous settings"
            )
        settings = extended(settings, found)
    if settings != found:
        write_json(file, settings)
    clusters = out / "clusters" / "clusters.json"
    if not clusters.is_file():
        arguments = ["--teacher", str(grid.teacher), "--manifest", str(grid.data / "train.tsv")]
        arguments += ["--out", str(out / "clusters"), "--compare", *grid.cluster]
        in_log(cluster.main, arguments, out / "cluster.log")
    return dict(read_json(clusters)), configs


def check_targets(runs: Sequence[Run], out: Path) -> None:
    """Raises ValueError if a run was started under the same name with another target."""
    for run in runs:
        file = out / "runs" / run.name / "target.json"
        wanted = json.loads(json.dumps(run.target.to_dict()))
        if file.is_file() and read_json(file) != wanted:
            raise ValueError(
                f"{file}: {read_json(file)}, but {run.method} is now {wanted}; rename the variant, remove the folder, "
                "or give another OUT"
            )


def measure_references(grid: Grid, out: Path) -> None:
    """The teacher and log-mel features under the same probes."""
    file = out / "references.json"
    found = read_json(file) if file.is_file() else {"teacher": {"probes": {}}, "logmel": {"probes": {}}}
    tasks = [read_task(folder) for folder in grid.tasks if folder.name not in found["teacher"]["probes"]]
    if not tasks:
        return
    teacher = load_encoder(grid.teacher)
    found["teacher"]["probes"].update(evaluate(EncoderFeatures(teacher), tasks, "teacher"))
    found["teacher"].setdefault("costs", costs(teacher))
    found["logmel"]["probes"].update(evaluate(level_free_log_mel, tasks, "logmel"))
    write_json(file, found)


def do_all(runs: Sequence[Run], out: Path, jobs: int, own_command: Sequence[str]) -> list[str]:
    """Runs each in its own process, several at a time; returns the names of failed runs."""
    children: list[subprocess.Popen[bytes]] = []
    failed: list[str] = []
    began, ended = time.monotonic(), 0

    def one(run: Run) -> None:
        nonlocal ended
        folder = out / "runs" / run.name
        folder.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        with open(folder / "log", "a", encoding="utf-8") as stream:
            child = subprocess.Popen([*own_command, "--run", run.name], stdout=stream, stderr=subprocess.STDOUT)
            children.append(child)
            code = child.wait()
        ended += 1
        if code:
            failed.append(run.name)
        outcome = {0: "done", STOPPED: "stopped"}.get(code, f"failed, see {folder / 'log'}")
        now = time.monotonic()
        print(f"[{ended}/{len(runs)}, {now - began:.0f} s] {run.name}: {outcome} in {now - start:.0f} s", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(one, run) for run in runs]
        try:
            for future in futures:
                future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            for child in children:
                if child.poll() is None:
                    child.terminate()
            raise
    return failed


def gather(grid: Grid, runs: Sequence[Run], out: Path) -> list[dict[str, Any]]:
    """The available results, one per method, sparsity and seed; a shared run appears under each of its methods."""
    found = []
    for run in runs:
        made_by = owner(run, runs)
        file = out / "runs" / made_by.name / "result.json"
        if not not_probed(file, grid):
            result = read_json(file)
            probes = {folder.name: result["probes"][folder.name] for folder in grid.tasks}
            found.append({**result, "probes": probes, "method": run.method, "made_by": made_by.method})
    return found


@reporting_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    args = parser().parse_args(argv)
    if args.list_methods:
        read = read_grid(args.grid, args.name)
        variants = read.variants
        meanings = {**METHODS, **{name: f"variant: {json.dumps(variant)}" for name, variant in variants.items()}}
        meanings.update({name: f"recipe: {' '.join([r.config, *r.overrides])}" for name, r in read.recipes.items()})
        print(aligned(list(meanings.items()), left=2))
        return 0
    if args.jobs < 1:
        raise ValueError(f"--jobs: {args.jobs}; expected at least 1")
    changes = {name: getattr(args, name) for name in ("methods", "sparsities", "seeds")}
    for name in ("teacher", "data"):
        value = getattr(args, name)
        changes[name] = None if value is None else str(value.resolve())
    changes["tasks"] = args.task and [str(task.resolve()) for task in args.task]
    grid, out = read_grid(args.grid, args.name, **changes), args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)

    def stop(number: int, frame: Any) -> None:
        raise Stopped

    signal.signal(signal.SIGTERM, stop)
    try:
        clusters, configs = prepare(grid, out)
        runs = runs_of(grid, clusters)
        whys = why_unreachable(runs, grid, configs)
        runs = [run for run in runs if run.name not in whys]
        check_targets(runs, out)
        if args.run:
            chosen = [run for run in runs if run.name == args.run]
            if not chosen:
                names = ", ".join(run.name for run in runs)
                why = whys.get(args.run, "is not in the grid")
                raise ValueError(f"--run: {args.run!r}: {why}; expected one of {names}")
            do_run(chosen[0], grid, out, configs, args.keep_checkpoints)
            return 0
        failed: list[str] = []
        if not args.table:
            measure_references(grid, out)
            to_do = [r for r in runs if owner(r, runs) == r and not_probed(out / "runs" / r.name / "result.json", grid)]
            print("".join(f"{name} is skipped: {why}\n" for name, why in whys.items()), end="")
            print(f"{len(to_do)} of {len(runs)} runs to make", flush=True)
            rest = sys.argv[1:] if argv is None else list(argv)
            failed = do_all(to_do, out, args.jobs, [sys.executable, str(Path(__file__).resolve()), *rest])
    except (Stopped, KeyboardInterrupt):
        print("Stopped. Finished parts are kept; run the same command again to resume.", file=sys.stderr)
        return STOPPED
    results = gather(grid, runs, out) if runs else []
    if not results:
        raise ValueError(f"{out}: no run has finished; see {out / 'runs'}/*/log")
    summary = summarise(results, read_json(out / "references.json"), grid.baseline)
    summary.update(wanted=len(runs), found=len(results), failed=failed, unreachable=whys)
    summary["settings"] = read_json(out / "settings.json")
    write_json(out / "results.json", summary)
    write_runs(out / "runs.csv", results)
    table = write_tables(summary)
    write_file(out / "table.md", table)
    print(table)
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="run.py", description=__doc__, epilog=EPILOG)
    add = made.add_argument
    add(
        "out",
        nargs="?",
        type=Path,
        default=HERE / "out",
        metavar="OUT",
        help="folder for everything (default: out here)",
    )
    add("--grid", type=Path, default=HERE / "grid.yaml", metavar="YAML", help="file of grids (default: grid.yaml here)")
    add("--name", default="reduced", help="grid of the file (default: reduced)")
    add("--teacher", type=Path, metavar="FILE", help="replaces the grid's")
    add("--data", type=Path, metavar="DIR", help="folder with train.tsv and valid.tsv; replaces the grid's")
    add("--task", type=Path, action="append", metavar="DIR", help="probe task; replaces the grid's; may be repeated")
    add("--methods", nargs="+", metavar="NAME", help="replaces the grid's")
    add("--sparsities", nargs="+", type=in_range(float, above=0, below=1), metavar="S", help="replaces the grid's")
    add("--seeds", nargs="+", type=seed, metavar="N", help="replaces the grid's")
    add("--jobs", type=in_range(int, least=1, most=1024), default=2, metavar="N", help="runs at a time (default: 2)")
    add("--run", metavar="NAME", help="only this run, METHOD-SPARSITY-SEED; no table")
    add("--table", action="store_true", help="train nothing, tabulate existing results")
    add("--keep-checkpoints", action="store_true", help="keep both stages' fairseq checkpoints")
    add("--list-methods", action="store_true", help="describe each method")
    return made


if __name__ == "__main__":
    sys.exit(main())
