"""Latency tables: times of whole students on this machine, with one part at a time made narrower, and a check."""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import torch

from skill_fairseq.benchmarking.setup import Setup
from skill_fairseq.messages import require
from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.size import widths_of
from skill_fairseq.pruning.latency import PARTS, LatencyCost, conv_share, fit

RUNTIMES = ("torch", "onnxruntime")
Shares = Dict[str, float]
"""Share of units that each part keeps."""


def student_config(full: EncoderConfig, shares: Shares) -> EncoderConfig:
    """The encoder with these shares of every layer; at least one conv channel each."""
    heads, units = (round(shares[part] * most) for part, most in _most(full).items())
    channels = [max(1, round(shares["conv"] * most)) for most, _, _ in full.conv_feature_layers]
    if not full.feature_linear:  # the last channels are the features
        channels[-1] = full.encoder_embed_dim
    layers = full.encoder_layers
    return full.replace(conv_channels=channels, heads=[list(range(heads))] * layers, ffn_dims=[units] * layers)


def _most(full: EncoderConfig) -> Dict[str, int]:
    return {"heads": full.encoder_attention_heads, "ffn": full.encoder_ffn_embed_dim}


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
    setup: Setup, runtime: str, points: int, checks: int, repeats: int, progress: Callable[[], object]
) -> Dict[str, Any]:
    """Times whole students: each part at several widths with the others at their least, and mixed ones as a check.

    Args:
        setup: architecture, audio, device, threads.
        runtime: a key of :data:`RUNTIMES`.
        points: widths of each part besides the least, evenly spaced up to the full one.
        checks: number of random mixed students whose measured time is compared with the table's.
        repeats: measured forwards of each student; the minimum counts.
        progress: called after every student.

    Returns:
        the table, see :mod:`skill_fairseq.pruning.latency`, with ``check``.
    """
    if runtime == "onnxruntime":
        require("--runtime onnxruntime", "onnxruntime")
    full = setup.full_encoder().config
    if not full.is_full():
        raise ValueError("--model: the encoder is pruned; give an unpruned one, whose students to time")

    def timed(shares: Shares) -> Tuple[EncoderConfig, float]:
        config = student_config(full, shares)
        found = milliseconds(config, setup, runtime, repeats)
        progress()
        return config, found

    none = dict.fromkeys(PARTS, 0.0)
    narrowest, least = timed(none)
    measured: Dict[str, List[Tuple[float, float]]] = {}
    for part in PARTS:
        measured[part] = [(width_of(narrowest, part), least)]
        for point in range(1, points + 1):
            # The conv stack's work grows with the square of its share.
            share = (point / points) ** (0.5 if part == "conv" else 1.0)
            config, found = timed({**none, part: share})
            if width_of(config, part) > measured[part][-1][0]:
                measured[part].append((width_of(config, part), found))
    table = fit(full, measured)
    cost = LatencyCost(table)  # type: ignore[arg-type]
    draw = random.Random(setup.seed)
    mixed = [dict.fromkeys(PARTS, 1.0), *({part: draw.uniform(0.1, 1.0) for part in PARTS} for _ in range(checks))]
    table["check"] = []
    for shares in mixed:
        config, found = timed(shares)
        expected = float(cost(config, widths_of(config)))
        table["check"].append({"macs": _macs(config, setup), "measured_ms": found, "table_ms": expected})
    return {**table, "runtime": runtime, "seconds": setup.seconds}


def _macs(config: EncoderConfig, setup: Setup) -> int:
    from skill_fairseq.modules.size import count_macs

    return int(count_macs(config, widths_of(config), round(setup.seconds * 16000)))  # type: ignore[arg-type]
