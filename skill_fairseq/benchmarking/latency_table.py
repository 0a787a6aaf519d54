"""Latency tables: fitted to times of whole students on this machine, and checked by times of others."""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Sequence

import torch

from skill_fairseq.benchmarking.setup import Setup
from skill_fairseq.messages import require
from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.size import widths_of
from skill_fairseq.pruning.latency import PARTS, LatencyCost, conv_share, fit

RUNTIMES = {"torch": 2, "onnxruntime": 1}
"""Programs that run the students, and how often each times every student, minutes apart: what disturbs one round rarely
disturbs the same student again. An export takes too long to repeat."""
Progress = Callable[[Sequence[int]], Iterable[int]]
Shares = Dict[str, Sequence[float]]
"""Share of units that each layer of a part keeps."""


def sites(full: EncoderConfig, part: str) -> int:
    """Number of layers of a part."""
    return len(full.conv_feature_layers) if part == "conv" else full.encoder_layers


def student_config(full: EncoderConfig, shares: Shares) -> EncoderConfig:
    """The encoder with these shares of its units; at least one conv channel each."""
    heads = [round(share * full.encoder_attention_heads) for share in shares["heads"]]
    units = [round(share * full.encoder_ffn_embed_dim) for share in shares["ffn"]]
    convs = zip(shares["conv"], full.conv_feature_layers)
    channels = [max(1, round(share * most)) for share, (most, _, _) in convs]
    if not full.feature_linear:  # the last channels are the features
        channels[-1] = full.encoder_embed_dim
    return full.replace(conv_channels=channels, heads=[list(range(kept)) for kept in heads], ffn_dims=units)


def uniform_student(full: EncoderConfig, **shares: float) -> EncoderConfig:
    """The encoder with these shares of all layers of a part, and as little as possible of parts not named."""
    return student_config(full, {part: [shares.get(part, 0.0)] * sites(full, part) for part in PARTS})


def mixed_student(full: EncoderConfig, draw: random.Random) -> EncoderConfig:
    """A student as training leaves them: each part has a random size, and its layers differ."""

    def shares(part: str) -> List[float]:
        mean = draw.random()
        return [min(max(mean + draw.uniform(-0.4, 0.4), 0.0), 1.0) for _ in range(sites(full, part))]

    return student_config(full, {part: shares(part) for part in PARTS})


def width_of(config: EncoderConfig, part: str) -> float:
    """The key of a part's times in the table."""
    column = widths_of(config)[part]
    return float(conv_share(config, column) if part == "conv" else column[0])


def forward(encoder: SpeechEncoder, audio: torch.Tensor, runtime: str, threads: int, folder: Path) -> Callable[[], Any]:
    """One forward of an encoder by a runtime."""
    if runtime == "torch":
        encoder = encoder.prepare()

        def by_torch() -> Any:
            with torch.inference_mode():
                return encoder(audio)

        return by_torch
    import onnxruntime

    from skill_fairseq.exporting.onnx_graph import save_onnx

    path = folder / "student.onnx"
    save_onnx(encoder.cpu().eval(), path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {"source": audio.numpy()}
    return lambda: session.run(["x"], feed)


def milliseconds(config: EncoderConfig, setup: Setup, runtime: str, repeats: int) -> float:
    """The minimum time of several forwards over one utterance, after two warm-up forwards."""
    torch.manual_seed(setup.seed)
    encoder, audio = SpeechEncoder(config).to(setup.device), setup.audio()
    found = float("inf")
    with tempfile.TemporaryDirectory() as folder:
        step = forward(encoder, audio, runtime, setup.threads or torch.get_num_threads(), Path(folder))
        for turn in range(repeats + 2):
            began = time.perf_counter()
            step()
            if setup.device.startswith("cuda"):
                torch.cuda.synchronize()
            found = min(found, time.perf_counter() - began) if turn >= 2 else found
    return 1000 * found


def measure_table(
    setup: Setup, runtime: str, points: int, mixed: int, checks: int, repeats: int, progress: Progress
) -> Dict[str, Any]:
    """Fits a table to times of whole students: each part at several widths without the others, and mixed ones.

    Args:
        setup: architecture, audio, device, threads.
        runtime: a key of :data:`RUNTIMES`.
        points: widths of each part besides the least, evenly spaced up to the full one.
        mixed: number of students with random widths to fit.
        checks: number of further ones, whose measured time is compared with the table's.
        repeats: measured forwards of each student in a round; the minimum counts.
        progress: wraps the sequence of all timings.

    Returns:
        the table, see :mod:`skill_fairseq.pruning.latency`, with ``check``.
    """
    if runtime == "onnxruntime":
        require("--runtime onnxruntime", "onnxruntime")
    full = setup.full_encoder().config
    if not full.is_full():
        raise ValueError("--model: the encoder is pruned; give an unpruned one, whose students to time")
    students = [uniform_student(full)]
    knots = {part: [width_of(students[0], part)] for part in PARTS}
    for part in PARTS:
        for point in range(1, points + 1):
            # The conv stack's work grows with the square of its share.
            student = uniform_student(full, **{part: (point / points) ** (0.5 if part == "conv" else 1.0)})
            if width_of(student, part) > knots[part][-1]:
                knots[part].append(width_of(student, part))
                students.append(student)
    students.append(full)
    draw = random.Random(setup.seed)
    students += [mixed_student(full, draw) for _ in range(mixed + checks)]
    times = [float("inf")] * len(students)
    for i in progress(list(range(len(students))) * RUNTIMES[runtime]):
        times[i] = min(times[i], milliseconds(students[i], setup, runtime, repeats))
    fitted = len(students) - checks
    table = fit(full, knots, students[:fitted], times[:fitted])
    cost = LatencyCost(table)  # type: ignore[arg-type]
    table["check"] = [
        {
            "macs": _macs(students[i], setup),
            "measured_ms": times[i],
            "table_ms": float(cost(students[i], widths_of(students[i]))),
        }
        for i in range(fitted, len(students))
    ]
    return {**table, "runtime": runtime, "seconds": setup.seconds}


def _macs(config: EncoderConfig, setup: Setup) -> int:
    from skill_fairseq.modules.size import count_macs

    return int(count_macs(config, widths_of(config), round(setup.seconds * 16000)))  # type: ignore[arg-type]
