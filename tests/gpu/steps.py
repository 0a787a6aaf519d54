"""The steps of run.sh: numbers, kills, training and inference speed, waits; results.json and table.md."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

import torch
from disturbed import Run, same_outcome
from numerics import rows
from runs import ENVIRONMENT

import skill_fairseq
from skill_fairseq.checkpoints import save_encoder
from skill_fairseq.files import write_json
from tests.conftest import random_encoder

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny"
GROUPS = "criterion.groups=[[0],[1,2,3],[4,5,6,7,8],[9,10,11,12]]"
MODES = {
    "fp32": [],  # first: the reference for the others
    "bf16": ["common.bf16=true", "common.fp16_no_flatten_grads=true"],
    "fp16": ["common.fp16=true", "common.fp16_no_flatten_grads=true"],
    "amp": ["common.amp=true"],
}


BENCH = "from skill_fairseq.cli.bench import main; raise SystemExit(main())"


class Steps:
    """Settings of every step.

    Args:
        out: folder of the results.
        device: "cuda" or "cpu"; a CPU uses small shapes, so that all steps take a minute or two.
    """

    def __init__(self, out: Path, device: str) -> None:
        self.out = out
        self.device = device
        self.gpu = device.startswith("cuda")

    def training(self, name: str, *overrides: str) -> Run:
        """A stage-1 run on the small teacher, 40 updates on a GPU, 6 on a CPU."""
        settings = [
            f"common.cpu={str(not self.gpu).lower()}",
            f"task.data={TINY / 'data'}",
            f"task.teacher={TINY / 'teacher' / 'teacher.safetensors'}",
            GROUPS,
            f"optimization.max_update={40 if self.gpu else 6}",
            "dataset.max_tokens=192000" if self.gpu else "dataset.max_tokens=32000",
            *overrides,
        ]
        return Run(self.out / name, *settings)

    def numerics(self) -> dict[str, Any]:
        found = {row.name: {"error": row.error, "limit": row.limit, "ok": row.ok} for row in rows(self.device)}
        return {"rows": found, "ok": all(row["ok"] for row in found.values())}

    def precisions(self) -> dict[str, Any]:
        """Losses of whole runs compared with float32."""
        losses = {}
        for mode, overrides in MODES.items():
            if mode in ("fp16", "amp") and not self.gpu:
                continue  # on a CPU tests/test_mixed_precision.py does this, and fairseq's amp does nothing
            run = self.training(f"run_{mode}", *overrides).finish()
            losses[mode] = [update["distillation_loss"] for update in run.updates().values()]
        exact = torch.tensor(losses["fp32"])
        off = {m: float((torch.tensor(v) - exact).abs().mean() / exact.abs().mean()) for m, v in losses.items()}
        return {"mean relative distance of the loss from fp32": off, "ok": all(value < 0.03 for value in off.values())}

    def kills(self) -> dict[str, Any]:
        """A bfloat16 run that is killed (on a GPU twice) ends like an undisturbed one."""
        straight = self.training("straight", *MODES["bf16"]).finish()
        disturbed = self.training("killed", *MODES["bf16"])
        last = straight.last_update()
        for stop in (last // 3, 2 * last // 3) if self.gpu else (last // 2,):
            disturbed.start()
            disturbed.wait_for(lambda stop=stop: disturbed.last_update() >= stop)  # type: ignore[misc]
            disturbed.kill()
        disturbed.finish()
        try:
            same_outcome(straight, disturbed)
            identical, where = True, None
        except AssertionError as error:
            identical, where = False, str(error)[:200]
        return {"identical bits": identical, "first difference": where, "ok": identical or self.gpu}

    def bench(self, what: str, *arguments: str) -> dict[str, Any]:
        command = [sys.executable, "-c", BENCH, what, *arguments, "--device", self.device]
        if self.gpu:
            size = ["--seconds", "15.6", "--batch-size", "10", "--precision", "bf16", "--repeats", "8", "--warmup", "3"]
        else:
            model = self.out / "model.safetensors"
            if not model.exists():
                save_encoder(random_encoder(), model)
            size = ["--model", str(model), "--seconds", "0.5", "--repeats", "1", "--warmup", "1", "--threads", "1"]
        done = subprocess.run([*command, *size, "--json"], check=True, env=ENVIRONMENT, stdout=subprocess.PIPE)
        return json.loads(done.stdout)["results"]

    def speed(self) -> dict[str, Any]:
        teacher = ["--teacher-dtype", "bf16"] if self.gpu else []
        return {
            "stage 1, gates open": self.bench("train", *teacher, "--against", "transformers"),
            "stage 1, gates at 75 %": self.bench("train", *teacher, "--sparsity", "0.75"),
            "stage 2, student of 25 %": self.bench("train", *teacher, "--sparsity", "0.75", "--stage", "2"),
            "inference, full": self.bench("infer", "--against", "transformers"),
            "inference, student of 25 %": self.bench("infer", "--sparsity", "0.75"),
        }

    def waits(self) -> dict[str, Any]:
        """Waits of the host in one training step, from torch's profiler."""
        from skill_fairseq.benchmarking.contestants import ours
        from skill_fairseq.benchmarking.setup import Setup

        sizes = {"seconds": 15.6, "batch": 10, "precision": "bf16", "teacher_dtype": "bf16"} if self.gpu else {}
        if not self.gpu:
            sizes = {"seconds": 0.5, "model": str(self.out / "model.safetensors")}
        step, _ = ours(Setup(device=self.device, sparsity=0.75 if self.gpu else 0.5, **sizes), "train")  # type: ignore[arg-type]
        for _ in range(3):
            step()
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profile:
            step()
        events = {
            event.key: {"calls": event.count, "host ms": round(event.cpu_time_total / 1000, 3)}
            for event in profile.key_averages()
            if event.key.startswith(
                ("wait: ", "cudaStreamSynchronize", "cudaDeviceSynchronize", "Memcpy DtoH", "Memcpy HtoD")
            )
        }
        return {"events": events, "ok": events.get("wait: open gates", {"calls": 0})["calls"] == 1}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    machine = results["machine"]
    lines = [f"{machine['device']}, torch {machine['torch']}, skill_fairseq {machine['skill_fairseq']}", ""]
    lines += ["| step | s a step | audio s per s | peak, GB | against |", "|---|---|---|---|---|"]
    for name, contestants in results.get("speed", {}).items():
        if not isinstance(contestants, dict):
            continue
        (own, mine), *others = contestants.items()
        total = mine["seconds"]["total"]["min"]
        against = ", ".join(f"{total / other['seconds']['total']['min']:.2f} of {who}'s time" for who, other in others)
        rate, peak = mine["audio seconds per second"], mine["peak bytes"] / 1e9
        lines.append(f"| {name} | {total:.4f} | {rate:.0f} | {peak:.2f} | {against or '-'} |")
    lines += ["", "| comparison | relative error | limit | |", "|---|---|---|---|"]
    for name, row in results.get("numerics", {}).get("rows", {}).items():
        lines.append(f"| {name} | {row['error']:.1e} | {row['limit']:.0e} | {'' if row['ok'] else 'FAILED'} |")
    off = results.get("precisions", {}).get("mean relative distance of the loss from fp32", {})
    lines += ["", *(f"- loss of a run in {mode}: {value:.2%} from that in fp32" for mode, value in off.items())]
    kills = results.get("kills", {})
    lines.append(f"- a run that was killed has the same bits as one that is not: {kills.get('identical bits')}")
    for name, event in results.get("waits", {}).get("events", {}).items():
        lines.append(f"- {name}: {event['calls']} a step, {event['host ms']} ms of the host")
    lines += ["", *(f"- {step}: {seconds:.0f} s" for step, seconds in results["seconds"].items())]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Runs every step, even after failures; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda", help="(default: cuda)")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(
            "--device: 'cuda', but torch sees no GPU here; expected 'cpu', which tries the script with small shapes"
        )
    steps = Steps(args.out, args.device)
    name = torch.cuda.get_device_name() if steps.gpu else platform.processor() or platform.machine()
    machine = {"device": name, "torch": torch.__version__, "skill_fairseq": skill_fairseq.__version__}
    results: dict[str, Any] = {"machine": machine, "seconds": {}}
    failed = []
    todo: list[Callable[[], dict[str, Any]]] = [steps.numerics, steps.speed, steps.waits, steps.precisions, steps.kills]
    for step in todo:
        began = time.monotonic()
        print(f"== {step.__name__}", flush=True)
        try:
            results[step.__name__] = step()
            if not results[step.__name__].get("ok", True):
                failed.append(step.__name__)
        except Exception as error:  # the others are still useful
            results[step.__name__] = {"failed": f"{type(error).__name__}: {error}"[-3000:]}
            failed.append(step.__name__)
        results["seconds"][step.__name__] = time.monotonic() - began
        write_json(args.out / "results.json", results)
    (args.out / "table.md").write_text(table(results))
    print(table(results))
    for name in failed:
        print(f"FAILED: {name}: {results[name].get('failed', 'see the table')}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
