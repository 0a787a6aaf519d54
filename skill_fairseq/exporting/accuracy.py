"""Compares an exported encoder with the float32 one: states, and results of linear probes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from skill_fairseq.audio.manifest import Manifest, readable
from skill_fairseq.audio.pieces import pieces
from skill_fairseq.clustering.calibration import choose_utterances
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.probing.evaluate import evaluate
from skill_fairseq.probing.pooling import Features
from skill_fairseq.probing.tasks import Task
from skill_fairseq.text_tables import markdown

Run = Callable[[Tensor], Mapping[str, Tensor]]
"""(1, N) samples to (1, T, D) states, by the names of an ONNX graph's outputs."""

LIMIT = 0.01
"""Relative L1 that causes a warning."""


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Measured accuracy.

    Attributes:
        relative_l1: sum of |exported - float32| divided by the sum of |float32|, over all frames, by output.
        cosine: mean over frames of the cosine between both, by output.
        recordings, num_frames: amount of audio.
        probes: results of linear probes, "float32" and "exported", by task.
    """

    relative_l1: dict[str, float]
    cosine: dict[str, float]
    recordings: int
    num_frames: int
    probes: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def worst(self) -> tuple[str, float]:
        """The output with the largest relative L1, and its value."""
        return max(self.relative_l1.items(), key=lambda item: item[1])

    def rows(self) -> list[list[str]]:
        """A readable table with a header."""
        names = self.relative_l1
        return [
            ["output", "relative L1", "cosine"],
            *([name, f"{100 * names[name]:.3f} %", f"{self.cosine[name]:.6f}"] for name in names),
        ]

    def probe_rows(self) -> list[list[str]]:
        """The same for the probes; empty without tasks."""
        if not self.probes:
            return []
        cells = ([f"{100 * found[kind]['value']:.1f} %" for kind in ("float32", "exported")] for found in self._tasks())
        titles = (f"{name}, {found['float32']['metric']}" for name, found in self.probes.items())
        return [["probe", "float32", "exported"], *([title, *cell] for title, cell in zip(titles, cells))]

    def about(self) -> str:
        """The amount of audio, in words."""
        return f"{self.recordings:,} recordings, {self.num_frames:,} frames"

    def markdown(self) -> str:
        """A section for a model card."""
        tables = [self.rows(), *filter(None, [self.probe_rows()])]
        text = "\n\n".join(map(markdown, tables))
        return (
            f"## Accuracy\n\nCompared with the float32 encoder, on {self.about()}. Relative L1 is the sum of absolute "
            f"differences divided by the sum of absolute values.\n\n{text}\n"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return dataclasses.asdict(self)

    def _tasks(self) -> Iterator[dict[str, Any]]:
        yield from self.probes.values()


def run_encoder(encoder: SpeechEncoder, names: Sequence[str]) -> Run:
    """The encoder itself, with the names of a graph's outputs."""
    layers = [int(name.rpartition("_")[2]) for name in names if name != "x"]
    last = None if "x" in names else max(layers)

    def run(source: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            out = encoder(source, last_layer=last)
        return {name: out.x if name == "x" else out.hidden_states[int(name.rpartition("_")[2])] for name in names}

    return run


def rounded(encoder: SpeechEncoder, dtype: torch.dtype) -> SpeechEncoder:
    """A float32 copy whose weights were stored in another type."""
    copied = SpeechEncoder(encoder.config).eval()
    copied.load_state_dict(
        {n: t.to(dtype).float() if t.is_floating_point() else t for n, t in encoder.state_dict().items()}
    )
    return copied


def sources(
    manifest: Manifest, encoder: SpeechEncoder, max_seconds: float, samples: Optional[int] = None, seed: int = 0
) -> Iterator[Tensor]:
    """Recordings of a manifest as encoder input, in pieces of at most a minute.

    Args:
        manifest: the recordings to choose from at random.
        encoder: sets the sample rate, and whether waveforms are normalised.
        max_seconds: total audio at most.
        samples: pad every piece with zeros to this length; None: no padding.
        seed: seed of the choice.

    Yields:
        (1, N) float32.

    Raises:
        ValueError: no recording fits the limit, or none can be read.
    """
    config = encoder.config
    chosen = choose_utterances(manifest, max_seconds, seed=seed, sample_rate=config.sample_rate)
    files = [manifest.files[i] for i in chosen]
    for _, wave in readable(files, [], config.sample_rate, config.receptive_field):
        yield from fitted(wave, encoder, samples)


def fitted(wave: Tensor, encoder: SpeechEncoder, samples: Optional[int] = None) -> Iterator[Tensor]:
    """(N,) samples of a recording to (1, N) pieces, see :func:`sources`."""
    wave = F.layer_norm(wave, wave.shape) if encoder.normalize else wave
    if samples is None:
        yield from pieces(wave[None], encoder.config.sample_rate)
        return
    for piece in wave[None].split(samples, 1):
        yield F.pad(piece, (0, samples - piece.size(1)))


@torch.no_grad()
def compare(reference: Run, exported: Run, audio: Iterable[Tensor]) -> Accuracy:
    """Measures all outputs of ``exported`` on the same audio.

    Args:
        reference: returns the same outputs, in float32.
        exported: the encoder to measure.
        audio: (1, N) samples each.

    Raises:
        ValueError: there is no audio, or a state is not finite.
    """
    difference: dict[str, float] = {}
    size: dict[str, float] = {}
    cosine: dict[str, float] = {}
    recordings = frames = 0
    for source in audio:
        wanted, found = reference(source), exported(source)
        recordings += 1
        for name, state in found.items():
            own, other = state.double(), wanted[name].double()
            if not own.isfinite().all():
                raise ValueError(f"{name}: the exported encoder gives values that are NaN or infinite; use fp32")
            difference[name] = difference.get(name, 0.0) + float((own - other).abs().sum())
            size[name] = size.get(name, 0.0) + float(other.abs().sum())
            cosine[name] = cosine.get(name, 0.0) + float(F.cosine_similarity(own, other, dim=-1).sum())
        frames += next(iter(found.values())).size(1)
    if not recordings:
        raise ValueError("accuracy: no audio; expected at least one recording")
    return Accuracy(
        {name: difference[name] / size[name] for name in difference},
        {name: cosine[name] / frames for name in cosine},
        recordings,
        frames,
    )


@dataclasses.dataclass(frozen=True)
class Speech:
    """Data to measure an exported encoder on.

    Attributes:
        manifest: recordings; None: do not measure.
        tasks: folders of labelled recordings for skill-probe.
        max_seconds: randomly chosen audio of the manifest, at most.
    """

    manifest: Optional[Manifest] = None
    tasks: Sequence[Task] = ()
    max_seconds: float = 120.0

    def measure(
        self, encoder: SpeechEncoder, names: Sequence[str], exported: Run, samples: Optional[int] = None
    ) -> Accuracy:
        """Measures an exported encoder.

        Args:
            encoder: in float32.
            names: names of the outputs.
            exported: returns them.
            samples: see :func:`sources`.

        Raises:
            ValueError: no recording can be used, or a state is not finite.
        """
        assert self.manifest is not None
        reference = run_encoder(encoder, names)
        found = compare(reference, exported, sources(self.manifest, encoder, self.max_seconds, samples))
        if not self.tasks:
            return found
        states = [name for name in names if name != "x"] or names

        def features(run: Run) -> Features:
            return lambda wave: ([run(part)[name][0] for name in states] for part in fitted(wave, encoder, samples))

        both = {"float32": reference, "exported": exported}
        by_kind = {kind: evaluate(features(run), self.tasks, kind) for kind, run in both.items()}
        probes = {task.name: {kind: _summary(by_kind[kind][task.name]) for kind in both} for task in self.tasks}
        return dataclasses.replace(found, probes=probes)


def _summary(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: entry[name] for name in ("metric", "value", "interval", "samples")}
