"""`skill-bench`: how fast, how large, how much memory."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

import skill_fairseq
from skill_fairseq.benchmarking.setup import Setup
from skill_fairseq.cli._bench_options import CONSUMERS, make_parser
from skill_fairseq.cli._common import Done, Parser, check_device, run
from skill_fairseq.messages import require
from skill_fairseq.pruning.latency import PARTS
from skill_fairseq.text_tables import aligned

RECIPE_UPDATES = 75_000
RECIPE_SECONDS = 610.0  # of audio an update: 4 GPUs x 152.5 s, which batches of at most 160 s hold on LibriSpeech


@run
def main(argv: Sequence[str] | None = None) -> Done:
    """Run the command; returns the exit code."""
    args = _parser().parse_args(argv)
    check_device(args.device)
    for name in getattr(args, "against", None) or []:
        require(f"--against {name}", *CONSUMERS.get(name, ()))
    if args.what == "load":
        require("skill-bench load", "fairseq")
    if args.device.startswith("cuda"):
        torch.cuda.set_device(torch.device(args.device).index or 0)
    if args.threads:
        torch.set_num_threads(args.threads)
    return Done({"what": args.what, **args.measure(args), "machine": _machine(args)})


def _setup(args: argparse.Namespace, **changes: Any) -> Setup:
    names = [name for name in Setup.__dataclass_fields__ if hasattr(args, name)]
    setup = Setup(**{**{name: getattr(args, name) for name in names}, **changes})
    if setup.keep_conv is not None and not setup.sparsity:
        raise ValueError(f"--keep-conv: {setup.keep_conv}; expected beside --sparsity above 0")
    return setup


def measure_steps(args: argparse.Namespace) -> dict[str, Any]:
    """`train` and `infer`."""
    from skill_fairseq.benchmarking.turns import largest_batch, take_turns

    setup = _setup(args)
    if getattr(args, "find_max_tokens", False):
        limit = _memory_limit(args)
        with tqdm(desc="batches tried", unit="", disable=None) as bar:
            batch, peak = largest_batch(setup, limit, bar.update)
        tokens = batch * round(setup.seconds * 16000)
        print(
            f"largest batch within {limit / 1e9:.1f} GB: {batch} x {setup.seconds:g} s, peak {peak / 1e9:.2f} GB\n"
            f"dataset.max_tokens={tokens}"
        )
        largest = {"limit bytes": limit, "batch": batch, "peak bytes": peak, "max_tokens": tokens}
        return {"setup": setup.__dict__, "results": None, "largest batch": largest}

    names = ["skill_fairseq", *(args.against or [])]
    limited = args.what == "infer" and not args.device.startswith("cuda")
    setups = [(name, setup) for name in [*names, *["products"] * limited]]
    with tqdm(total=len(setups) * (args.warmup + args.repeats), desc="steps", disable=None) as bar:
        results = take_turns(setups, args.what, args.repeats, args.warmup, bar.update)
    found = dict(zip(names, results))
    record: dict[str, Any] = {"setup": setup.__dict__, "results": found}
    record["largest batch" if args.what == "train" else "products"] = None
    if limited:
        product = results[-1]
        rate = product["macs"] / product["seconds"]["total"]["min"]
        record["products"] = {"precision": args.precision, "GMACs per second": rate / 1e9}
        for result in found.values():
            if "macs" in result:
                result["limit seconds"] = result["macs"] / rate
    print(format_steps(found, args.what))
    if limited:
        print(f"products in {args.precision} on this machine: {2 * rate / 1e9:.0f} G operations/s, the limit's rate")
    return record


def format_steps(results: dict[str, dict[str, Any]], what: str) -> str:
    """A column a contestant, a line a phase."""
    phases = list(next(iter(results.values()))["seconds"])
    rows = [["", *results]]
    for phase in phases:
        cells = (r["seconds"][phase] for r in results.values())
        rows.append([f"{phase}, s", *(f"{c['min']:.3f} (median {c['median']:.3f})" for c in cells)])
    rows.append(["audio s per s", *(f"{r['audio seconds per second']:.1f}" for r in results.values())])
    rows.append(["peak memory, GB", *(f"{r['peak bytes'] / 1e9:.2f}" for r in results.values())])
    rows.append(
        ["parameters, M", *(f"{r.get('expected parameters', r['parameters']) / 1e6:.2f}" for r in results.values())]
    )
    rows.append(["MACs, G", *(f"{r['macs'] / 1e9:.1f}" if "macs" in r else "-" for r in results.values())])
    if any("limit seconds" in r for r in results.values()):
        limits = [(r["seconds"]["total"]["min"], r.get("limit seconds")) for r in results.values()]
        rows.append(["limit by MACs, s", *("-" if limit is None else f"{limit:.3f}" for _, limit in limits)])
        rows.append(["time / limit", *("-" if limit is None else f"{time / limit:.2f}" for time, limit in limits)])
    if any("precision" in r for r in results.values()):
        rows.append(["precision", *(r.get("precision") or "-" for r in results.values())])
    if len(results) > 1:
        own, *others = (r["seconds"]["total"] for r in results.values())
        shares = [[f"{own[kind] / other[kind]:.3f}" for kind in ("min", "median")] for other in others]
        rows.append(["time ratio to it", "1", *(f"{least} (median {middle})" for least, middle in shares)])
    if what == "train":
        speed = next(iter(results.values()))["audio seconds per second"]
        hours = RECIPE_UPDATES * RECIPE_SECONDS / speed / 3600
        rows.append([f"{RECIPE_UPDATES:,} updates of {RECIPE_SECONDS:g} s", f"{hours:,.0f} h at this speed", ""])
    chosen = next(iter(results.values())).get("kernels")
    shapes = "\nkernels, by number of shapes: " + ", ".join(f"{name} {count}" for name, count in (chosen or {}).items())
    return aligned(rows) + (shapes if chosen else "")


def measure_cluster(args: argparse.Namespace) -> dict[str, Any]:
    """`cluster`."""
    from skill_fairseq.benchmarking.contestants import Stopwatch
    from skill_fairseq.clustering.similarity import LayerSimilarity

    setup = _setup(args)
    encoder, audio = setup.full_encoder().prepare(), setup.audio()
    forward: list[float] = []
    measure: list[float] = []
    similarity = LayerSimilarity()
    for turn in tqdm(range(args.warmup + args.repeats), desc="batches", disable=None):
        watch = Stopwatch(setup.device)
        with torch.inference_mode():
            states = encoder(audio).hidden_states
            watch.lap("forward")
            similarity.update(states)
            watch.lap("similarity")
        if turn >= args.warmup:
            forward.append(watch.times["forward"])
            measure.append(watch.times["similarity"])
    share = sum(measure) / sum(forward)
    print(
        f"forward     {min(forward):.3f} s (mean {sum(forward) / len(forward):.3f})\n"
        f"similarity  {min(measure):.3f} s (mean {sum(measure) / len(measure):.3f}), {100 * share:.1f} % on top"
    )
    return {"setup": setup.__dict__, "forward s": forward, "similarity s": measure, "overhead": share}


def measure_loading(args: argparse.Namespace) -> dict[str, Any]:
    """`load`."""
    from omegaconf import OmegaConf

    from skill_fairseq.tasks.skill_distillation import SkillDistillationConfig, SkillDistillationTask

    fields = {
        "data": str(args.manifest.parent),
        "sample_rate": 16000,
        "max_sample_size": args.max_sample_size,
        "min_sample_size": args.min_sample_size,
        "tpu": False,
    }
    cfg: Any = OmegaConf.merge(OmegaConf.structured(SkillDistillationConfig), fields)
    task = SkillDistillationTask(cfg)
    split = args.manifest.stem
    task.load_dataset(split)
    epoch = task.get_batch_iterator(
        task.dataset(split), max_tokens=args.max_tokens, num_workers=args.workers, seed=1, epoch=1
    ).next_epoch_itr(shuffle=True)
    samples = batches = 0
    began = time.perf_counter()
    with tqdm(total=round(args.max_seconds), desc="loading", unit="s audio", disable=None) as bar:
        for batch in epoch:
            new = batch["net_input"]["source"].numel()
            samples, batches = samples + new, batches + 1
            bar.update(round(new / 16000))
            if samples >= args.max_seconds * 16000:
                break
    elapsed = time.perf_counter() - began
    speed = samples / 16000 / elapsed
    print(f"{batches} batches, {samples / 16000:.0f} s of audio in {elapsed:.2f} s: {speed:.0f} audio s per s")
    return {"batches": batches, "audio seconds": samples / 16000, "seconds": elapsed, "audio seconds per second": speed}


def measure_latencies(args: argparse.Namespace) -> dict[str, Any]:
    """`table`."""
    from skill_fairseq.benchmarking.latency_table import measure_table

    setup = _setup(args)
    table = measure_table(
        setup,
        args.runtime,
        args.points,
        args.mixed,
        args.checks,
        args.repeats,
        lambda timings: tqdm(timings, desc="students", disable=None),
    )
    rows = [["part", "width", "ms"]]
    for part in PARTS:
        pairs = zip(table[part]["widths"], table[part]["ms"])
        rows += [[part, f"{width:.4g}", f"{ms:.3f}"] for width, ms in pairs]
    checks = [["whole students, G MACs", "measured, ms", "by the table, ms"]]
    checks += [[f"{c['macs'] / 1e9:.2f}", f"{c['measured_ms']:.2f}", f"{c['table_ms']:.2f}"] for c in table["check"]]
    flat = [part for part in PARTS if table[part]["ms"][-1] <= table[part]["ms"][0]]
    if flat:
        print(
            f"warning: {', '.join(flat)}: no time rose with the width; the machine is busy, or --repeats "
            f"{args.repeats} too few",
            file=sys.stderr,
        )
    print(f"{aligned(rows)}\nrest {table['rest_ms']:.3f} ms\n\n{aligned(checks)}")
    return {"setup": setup.__dict__, **table}


def _memory_limit(args: argparse.Namespace) -> int:
    if args.memory is not None:
        return round(args.memory * 1e9)
    if not args.device.startswith("cuda"):
        raise ValueError("--find-max-tokens: without a GPU it needs --memory GB, which training may use")
    return torch.cuda.get_device_properties(args.device).total_memory


def _machine(args: argparse.Namespace) -> dict[str, Any]:
    on_gpu = getattr(args, "device", "cpu").startswith("cuda")
    return {
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "skill_fairseq": skill_fairseq.__version__,
    }


MEASURES = {
    "train": measure_steps,
    "infer": measure_steps,
    "cluster": measure_cluster,
    "table": measure_latencies,
    "load": measure_loading,
}


def _parser() -> Parser:
    return make_parser(MEASURES)
