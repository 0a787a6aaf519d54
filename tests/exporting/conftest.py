"""A very unevenly pruned student of the tiny teacher, exported in every format by skill-export itself."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from torch import Tensor

from skill_fairseq.checkpoints import load_encoder, save_encoder
from skill_fairseq.cli._export_options import SUFFIXES
from skill_fairseq.cli.export import main
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.units import UNITS, with_units
from skill_fairseq.pruning.shrink import shrink

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny"
UTTERANCES = ("george/fsdd-george-0-00", "lucas/fsdd-lucas-3-01", "jackson/fsdd-jackson-7-05")
PROVENANCE = {"source": "stage2.pt", "groups": [[0, 1], [2]], "target_sparsity": 0.9, "num_updates": 200}

CONV = (7, 30, 2, 64, 1, 33, 40)
HEADS = (3, 0, None, 1)  # None: the sublayer is removed; 0: its bias stays; further layers lose both sublayers
FFN = (77, None, 300, 0)


@pytest.fixture(scope="session")
def exporting() -> Any:
    """The functions and constants of this file."""
    return sys.modules[__name__]


def keep(number: int, out_of: int, generator: torch.Generator) -> Tensor:
    """(out_of,) bool with ``number`` random ones."""
    return torch.randperm(out_of, generator=generator) < number


@pytest.fixture(scope="session")
def student() -> SpeechEncoder:
    """The tiny teacher, gated at random and shrunk."""
    teacher = load_encoder(EXAMPLE / "teacher" / "teacher.safetensors")
    gated = SpeechEncoder(teacher.config.replace(pruning_units=list(UNITS))).eval()
    gated.load_state_dict(with_units(gated.config, teacher.state_dict(), teacher.config), strict=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, gate in gated.named_gates():
            gate.log_alpha.copy_(torch.randn(gate.num_units, generator=generator) + 2)
            if gate.unit == "rank":  # 0, 7, ... 35, of which some are one matrix
                gate.set_kept(keep(7 * (gate.site.place % 6), gate.num_units, generator))
    for layer, channels in zip(gated.feature_extractor.layers, CONV):
        layer.gate.set_kept(keep(channels, layer.gate.num_units, generator))
    rest = (None,) * (gated.config.encoder_layers - len(HEADS))
    for layer, heads, units in zip(gated.transformer.layers, HEADS + rest, FFN + rest):
        for sublayer, number in ((layer.attention, heads), (layer.ffn, units)):
            sublayer.output_gate.set_kept(torch.tensor([number is not None]))
            sublayer.gate.set_kept(keep(number or 0, sublayer.gate.num_units, generator))
    small = shrink(gated)
    assert small.config.conv_channels == list(CONV) and small.config.ffn_dims == [*FFN, *rest]
    assert [None if heads is None else len(heads) for heads in small.config.heads] == [*HEADS, *rest]
    assert {type(layer.ffn.fc1).__name__ for layer in small.transformer.layers[::2][:2]} == {"LowRankLinear"}
    assert small.config.unit_widths["rank"][:6] == [0, 7, 14, 21, 28, 35] and small.transformer.layers[0].attention
    return small


@pytest.fixture(scope="session")
def speech() -> tuple[Tensor, Tensor]:
    """(B, N) real speech, zero in the padding, and its padding mask; the first is the longest."""
    folder = EXAMPLE / "data" / "audio" / "fsdd"
    waves = [torch.from_numpy(soundfile.read(str(folder / f"{name}.flac"), dtype="float32")[0]) for name in UTTERANCES]
    waves.sort(key=len, reverse=True)
    lengths = torch.tensor([len(wave) for wave in waves])
    source = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
    padding = torch.arange(source.size(1)) >= lengths[:, None]
    assert padding.any(1).tolist() == [False, True, True]
    return source, padding


@pytest.fixture(scope="session")
def export(student: SpeechEncoder, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Exports the student to the format ``--to``, once, and returns the file or folder; ONNX with the mask."""
    folder = tmp_path_factory.mktemp("exported")
    save_encoder(student, folder / "student.safetensors", PROVENANCE)

    @functools.cache
    def write(way: str) -> Path:
        out = folder / (f"exported{SUFFIXES[way]}" if SUFFIXES[way] else way)
        mask = ["--padding-mask"] if way == "onnx" else []
        assert main([str(folder / "student.safetensors"), str(out), "--to", way, *mask]) == 0
        return out

    return write


def states_of(encoder: SpeechEncoder, source: Tensor, padding: Tensor | None = None) -> list[Tensor]:
    """All hidden states, then the output."""
    with torch.no_grad():
        out = encoder(source, padding)
    return [*out.hidden_states, out.x]


def assert_same(found: list[Any], wanted: list[Tensor], skip: Tensor | None = None, tolerance: float = 1e-4) -> None:
    """Checks that all states agree in shape and, except for the frames of ``skip`` (B, T), in value."""
    assert len(found) == len(wanted)
    for i, (a, b) in enumerate(zip(found, wanted)):
        a = torch.as_tensor(a)
        assert a.shape == b.shape and b.std() > 0.01
        counts = torch.ones(b.shape[:2], dtype=torch.bool) if skip is None else ~skip
        assert (a - b)[counts].abs().max() <= tolerance, f"state {i}"


WITHOUT = """
import sys
sys.modules["skill_fairseq"] = None  # as if it were not installed
sys.modules["torchaudio"] = None  # PyPI's cannot be imported beside a CPU torch, and transformers and s3prl try
"""


def run_without_package(code: str, *arguments: Any) -> str:
    """Runs Python code where ``import skill_fairseq`` fails; returns its output."""
    path = os.pathsep.join(str(p) for p in sys.path if p and not (Path(p) / "skill_fairseq").is_dir())
    command = [sys.executable, "-c", WITHOUT + code, *map(str, arguments)]
    with tempfile.TemporaryDirectory() as home:  # transformers copies the code of models there
        changes = {"PYTHONPATH": path, "SKILL_FAIRSEQ_HOOK": "0", "HF_HOME": home, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env={**os.environ, **changes}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
