"""Setup of a measurement: architecture, sparsity, batch, device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Optional

import torch
from torch import Tensor

from skill_fairseq.checkpoints import load_encoder
from skill_fairseq.modules import config as shapes
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.transformer import Dropouts
from skill_fairseq.pruning.expected import expected_parameters, full_parameters
from skill_fairseq.pruning.shrink import shrink

ARCHITECTURES = {
    "wavlm_base": shapes.wavlm_base,
    "wavlm_base_plus": shapes.wavlm_base,
    "wavlm_large": shapes.wavlm_large,
    "hubert_base": shapes.hubert_base,
    "hubert_large": shapes.hubert_large,
}
"""Shapes by name, used with random weights, since speed does not depend on their values."""

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INFERENCE_PRECISIONS = (*PRECISIONS, "int8")


@dataclass(frozen=True)
class Setup:
    """One measurement.

    Attributes:
        arch: key of :data:`ARCHITECTURES`, not used if ``model`` is given.
        model: file or folder to load instead.
        stage: 1 (gates at ``sparsity``) or 2 (the student shrunk to ``sparsity``).
        sparsity: fraction of the parameters to remove.
        keep_conv: fraction of the conv channels to keep; None: the same as for heads and FFN units.
        seconds: length of an utterance.
        batch: utterances per batch.
        device: torch device.
        precision: key of :data:`PRECISIONS`, in inference also int8; below fp32 by autocast: gates and sizes
            stay float32.
        teacher_dtype: precision of the teacher.
        compile: run through ``torch.compile``: the teacher's layers in training, the encoder's in inference.
        threads: CPU threads; None: torch's default.
        seed: seed of weights, audio and gates.
    """

    arch: str = "wavlm_base_plus"
    model: Optional[str] = None
    stage: int = 1
    sparsity: float = 0.0
    keep_conv: Optional[float] = None
    seconds: float = 15.0
    batch: int = 1
    device: str = "cpu"
    precision: str = "fp32"
    teacher_dtype: str = "fp32"
    compile: bool = False
    threads: Optional[int] = None
    seed: int = 0

    def audio(self) -> Tensor:
        """(batch, samples) of unit-variance noise."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.batch, round(self.seconds * 16000), generator=generator).to(self.device)

    def full_encoder(self) -> SpeechEncoder:
        """The encoder before pruning, on the device."""
        if self.model:
            return load_encoder(self.model, self.device)
        torch.manual_seed(self.seed)
        return SpeechEncoder(ARCHITECTURES[self.arch]()).to(self.device)


def gated_student(teacher: SpeechEncoder, sparsity: float, keep_conv: Optional[float], seed: int) -> SpeechEncoder:
    """A copy with gates on conv channels, heads and FFN units, set randomly to a sparsity.

    Args:
        teacher: the full encoder.
        sparsity: expected fraction of removed parameters; 0: gates as at the start of training.
        keep_conv: fraction of the conv channels that stays open; None: the same fraction as for everything else.
        seed: seed of the choice.

    Raises:
        ValueError: the sparsity cannot be reached.
    """
    config = teacher.config.replace(pruning_units=["conv", "heads", "ffn"])
    student = SpeechEncoder(config, Dropouts(hidden=0.1, attention=0.1)).to(next(teacher.parameters()).device)
    student.load_state_dict(teacher.state_dict(), strict=False)
    if not sparsity:
        return student
    full = full_parameters(config)

    def reached(keep: float) -> float:
        generator = torch.Generator().manual_seed(seed)
        for _, gate in student.named_gates():
            share = keep_conv if keep_conv is not None and gate.unit == "conv" else keep
            order = torch.randperm(gate.num_units, generator=generator)
            closed = order[max(1, round(share * gate.num_units)) :]
            # No ties: shrinking to the exact size would cut those of the first modules, and so only conv channels.
            score = 8.0 + torch.rand(gate.num_units, generator=generator)
            score[closed] *= -1
            with torch.no_grad():
                gate.log_alpha.copy_(score)
        return 1 - float(expected_parameters(student).detach()) / full

    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if reached(middle) > sparsity else (low, middle)
    if abs(reached(high) - sparsity) > 0.02:
        raise ValueError(
            f"--sparsity: {sparsity} cannot be reached with {keep_conv} of the conv channels kept (nearest: "
            f"{reached(high):.3f}); change --sparsity or --keep-conv"
        )
    return student


def student_of(setup: Setup, teacher: SpeechEncoder) -> SpeechEncoder:
    """The student that a stage trains."""
    student = gated_student(teacher, setup.sparsity, setup.keep_conv, setup.seed)
    if setup.stage == 1:
        return student
    small = shrink(student.eval(), setup.sparsity or None)
    result = SpeechEncoder(small.config, student.dropouts).to(setup.device)
    result.load_state_dict(small.state_dict())
    return result


def equal_groups(num_layers: int, number: int = 4) -> List[List[int]]:
    """Layers 0 to ``num_layers`` in runs of about equal length, in place of skill-cluster's groups."""
    bounds = [round(i * (num_layers + 1) / number) for i in range(number + 1)]
    return [list(range(a, b)) for a, b in zip(bounds, bounds[1:])]
