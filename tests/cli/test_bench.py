"""`skill-bench` measures what it reports, on an encoder of a few thousand parameters."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from messages import says

from skill_fairseq.benchmarking import turns
from skill_fairseq.benchmarking.contestants import huggingface_encoder
from skill_fairseq.benchmarking.setup import Setup, equal_groups, gated_student, student_of
from skill_fairseq.checkpoints import save_encoder
from skill_fairseq.cli._bench_options import PRINTS
from skill_fairseq.cli.bench import main
from skill_fairseq.modules.config import EncoderConfig, hubert_base, wavlm_base, wavlm_large
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.pruning.expected import expected_parameters, full_parameters
from tests.conftest import random_encoder

SMALL = ["--seconds", "0.5", "--repeats", "2", "--warmup", "1", "--threads", "1"]


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "model.safetensors"
    save_encoder(random_encoder(), path)
    return str(path)


def measure(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    """The record, and the text."""
    assert main([*arguments, "--json"]) == 0
    printed = capsys.readouterr()
    record = json.loads(printed.out)
    assert set(record) == set(PRINTS[arguments[0]]) and "\r" not in printed.err
    return record, printed.err


@pytest.mark.slow
def test_training_step(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--model", model, "--sparsity", "0.5", "--against", "transformers", *SMALL]
    began = time.monotonic()
    record, table = measure(arguments, capsys)
    results = record["results"]
    elapsed = time.monotonic() - began
    assert list(results) == ["skill_fairseq", "transformers"]
    for result in results.values():
        phases = {phase: times["min"] for phase, times in result["seconds"].items()}
        total = phases.pop("total")
        assert list(phases) == ["teacher", "student forward, loss", "backward", "optimizer"]
        assert min(phases.values()) > 0
        assert result["audio seconds per second"] == pytest.approx(0.5 / total)
    totals = [result["seconds"]["total"]["min"] for result in results.values()]
    assert 3 * sum(totals) < elapsed  # three steps of each, in turn
    assert "time ratio" in table and f"{results['transformers']['seconds']['total']['min']:.3f}" in table


@pytest.mark.slow
def test_the_peak_grows_by_what_a_larger_batch_holds(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """At least its samples and the first convolution's 16 channels per 5 samples."""
    peaks = []
    for batch in (1, 9):
        arguments = ["infer", "--model", model, "--repeats", "1", "--warmup", "0", "--seconds", "20"]
        record, _ = measure([*arguments, "--batch-size", str(batch)], capsys)
        peaks.append(record["results"]["skill_fairseq"]["peak bytes"])
    held = 8 * 20 * 16000 * 4 * (1 + 16 / 5)
    assert held < peaks[1] - peaks[0] < 10 * held


@pytest.mark.slow
def test_inference_of_a_shrunk_student_beside_the_full_encoder(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    record, _ = measure(["infer", "--model", model, "--sparsity", "0.5", "--against", "full", *SMALL], capsys)
    results = record["results"]
    full = random_encoder()
    assert results["full"]["parameters"] == full.num_parameters()
    assert results["full"]["macs"] == full.macs(0.5)
    assert results["skill_fairseq"]["parameters"] == pytest.approx(full.num_parameters() / 2, rel=0.02)


def test_largest_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks: list[int] = []

    class OfKnownSize:
        """A contestant that needs 10 bytes per utterance, and fails above 70."""

        def __init__(self, name: str, setup: Setup, what: str) -> None:
            if setup.batch > 7:
                raise turns.DoesNotFit("out of memory")
            self.peak = 10 * setup.batch
            peaks.append(self.peak)

        def step(self) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setattr(turns, "Contestant", OfKnownSize)
    for limit, batch in ((10, 1), (59, 5), (69, 6), (1000, 7)):
        assert turns.largest_batch(Setup(), limit, lambda: None) == (batch, 10 * batch)
    with pytest.raises(ValueError, match=says("--memory", "0.00 GB", "--seconds")):
        turns.largest_batch(Setup(), 5, lambda: None)

    class Broken(OfKnownSize):
        def step(self) -> None:
            raise RuntimeError("a defect")

    monkeypatch.setattr(turns, "Contestant", Broken)
    with pytest.raises(RuntimeError, match="a defect"):
        turns.largest_batch(Setup(), 100, lambda: None)


@pytest.fixture
def killer(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sends a signal to the next contestant's process as soon as it exists."""

    def arm(number: int) -> None:
        start = multiprocessing.context.SpawnProcess.start

        def start_and_kill(process: Any) -> None:
            start(process)
            os.kill(process.pid, number)

        monkeypatch.setattr(multiprocessing.context.SpawnProcess, "start", start_and_kill)

    return arm


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_a_crash_or_a_kill_is_no_lack_of_memory(
    number: int, killer: Callable[[int], None], model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise the search would end with a smaller batch, or report that nothing fits."""
    killer(number)
    arguments = ["train", "--model", model, "--find-max-tokens", "--memory", "100", *SMALL]
    assert main(arguments) == 2
    printed, error = capsys.readouterr()
    assert re.search(says("error", "process", signal.Signals(number).name), error) and "max_tokens" not in printed
    assert "--memory" not in error and ("lack of memory" in error) == (number == signal.SIGKILL)


def test_a_kill_by_a_system_without_memory_is_one(
    killer: Callable[[int], None], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulates a rise of the system's count of such kills, which no test can cause."""
    counts = iter(range(100))
    monkeypatch.setattr(turns, "oom_kills", lambda: next(counts))
    killer(signal.SIGKILL)
    with pytest.raises(ValueError, match=says("--memory", "100.00 GB", "--seconds")):
        turns.largest_batch(Setup(model=model, seconds=0.5), 10**11, lambda: None)


def test_memory_that_a_process_cannot_get_is_a_batch_that_does_not_fit(model: str) -> None:
    """A petabyte of audio: torch's allocator refuses it in the contestant's process."""
    with pytest.raises(turns.DoesNotFit, match="can't allocate memory|not enough memory"):
        turns.Contestant("skill_fairseq", Setup(model=model, seconds=80_000, batch=200_000), "infer")


@pytest.mark.slow
def test_a_batch_is_really_run(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A process that only imports torch takes more than this."""
    assert main(["train", "--model", model, "--find-max-tokens", "--memory", "0.05", "--seconds", "1"]) == 2
    assert re.search(says("--memory", "0.05 GB", "1 s"), capsys.readouterr().err)


def test_clustering_and_loading(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    record, _ = measure(["cluster", "--model", model, *SMALL], capsys)
    assert record["overhead"] == pytest.approx(sum(record["similarity s"]) / sum(record["forward s"]))
    manifest = Path(__file__).parents[2] / "examples/tiny/data/train.tsv"
    record, _ = measure(["load", "--manifest", str(manifest), "--max-seconds", "20", "--min-sample-size", "0"], capsys)
    assert record["audio seconds"] >= 20
    assert record["audio seconds per second"] == pytest.approx(record["audio seconds"] / record["seconds"])


@pytest.mark.parametrize("keep_conv", [None, 0.8])
def test_students_of_a_sparsity(keep_conv: float | None) -> None:
    teacher = SpeechEncoder(wavlm_base())
    gated = gated_student(teacher, 0.75, keep_conv, 0)
    assert 1 - float(expected_parameters(gated).detach()) / 94_381_168 == pytest.approx(0.75, abs=0.01)
    conv = [int((g.log_alpha > 0).sum()) for n, g in gated.named_gates() if n.startswith("feature_extractor.")]
    assert len(set(conv)) == 1 and (keep_conv is None or conv[0] == round(0.8 * 512))


def test_a_shrunk_student_keeps_about_the_same_share_of_everything() -> None:
    setup = Setup(sparsity=0.75, stage=2)
    config = student_of(setup, SpeechEncoder(wavlm_base())).config
    assert all(0.18 <= channels / 512 <= 0.23 for channels in config.conv_channels)
    assert all(0.19 <= units / 3072 <= 0.22 for units in config.ffn_dims)


@pytest.mark.skipif(not hasattr(torch.device("cpu"), "__enter__"), reason="torch < 2.0: no device as a context")
@pytest.mark.parametrize("shape", [wavlm_base(), hubert_base(), wavlm_large()])
def test_both_sides_have_the_same_architecture(shape: EncoderConfig) -> None:
    with torch.device("meta"):
        other = huggingface_encoder(shape)
    mask_embedding = shape.encoder_embed_dim
    assert sum(p.numel() for p in other.parameters()) == full_parameters(shape) + mask_embedding


@pytest.mark.nightly
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_every_consumer_in_turn(model: str, precision: str, capsys: pytest.CaptureFixture[str]) -> None:
    for module in ("transformers", "onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(module)
    names = ["transformers", "onnxruntime", "openvino"]
    arguments = ["infer", "--model", model, "--precision", precision, "--against", ",".join(names), *SMALL]
    record, table = measure(arguments, capsys)
    results = record["results"]
    assert list(results) == ["skill_fairseq", *names]
    rate = record["products"]["GMACs per second"] * 1e9
    assert rate > 0
    for name in ("skill_fairseq", "onnxruntime", "openvino"):
        assert results[name]["macs"] == random_encoder().macs(0.5)
        assert results[name]["limit seconds"] == pytest.approx(results[name]["macs"] / rate)
    assert results["transformers"]["precision"] == "fp32" and results["openvino"]["precision"] == precision
    assert results["skill_fairseq"]["kernels"] == {"plain": 1}  # small products are not measured
    assert all(row in table for row in ("time / limit", "time ratio to it", "kernels", f"products in {precision}"))


def test_groups_that_stand_in_for_clusters() -> None:
    assert equal_groups(12) == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9], [10, 11, 12]]
    assert sum(equal_groups(24), []) == list(range(25))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "--sparsity", "1.5"], "--sparsity: 1.5"),
        (["infer", "--seconds", "0"], "--seconds: 0.0"),
        (["infer", "--repeats", "0"], "--repeats: 0"),
        (["train", "--sparsity", "0.5", "--keep-conv", "1.5"], "--keep-conv: 1.5"),
        (["infer", "--seconds", "nan"], "--seconds: nan"),
        (["infer", "--seconds", "1e308"], "--seconds: 1e+308"),
        (["infer", "--threads", "-1"], "--threads: -1"),
        (["infer", "--seed", "-1"], "--seed: -1"),
        (["infer", "--batch-size", "1e3"], "--batch-size: '1e3'"),
        (["train", "--find-max-tokens", "--memory", "inf"], "--memory: inf"),
        (["infer", "--device", "cuda:9"], "--device: 'cuda:9'"),
        (["load", "--manifest", "train.tsv", "--workers", "-1"], "--workers: -1"),
        (["train", "--keep-conv", "0.5"], "--keep-conv: 0.5"),
        (["train", "--find-max-tokens"], "--memory"),
        (["infer", "--model", "missing.pt"], "missing.pt"),
        (
            ["infer", "--against", "onnxruntime,tflite"],
            "--against: 'onnxruntime,tflite'; expected some of",
        ),
        (["train", "--against", "openvino"], "--against: 'openvino'; expected some of transformers"),
    ],
)
def test_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
