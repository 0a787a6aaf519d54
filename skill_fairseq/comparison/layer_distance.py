"""Distance of a student's hidden states to its teacher's, by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from skill_fairseq.audio.manifest import readable
from skill_fairseq.audio.pieces import pieces
from skill_fairseq.clustering.similarity import MIN_BLOCK, cka_distance, unbiased_hsic
from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.objectives.groups import map_groups

KINDS = ("l1", "l1_normalized", "cos", "cka")
"""Mean |s - t|; the same for states normalised to zero mean and unit variance per frame; mean 1 - cos; and 1 - unbiased
linear CKA over a recording's frames. Only CKA ignores rotation and scale, which a projection may change."""
SHOWN = {"l1_normalized": "L1 normalised", "cos": "1 - cos", "cka": "1 - CKA"}
"""The kinds in tables and pictures, and their names there."""


@dataclasses.dataclass(frozen=True)
class LayerDistances:
    """Distances of each kind that the widths allow: all of :data:`KINDS`, or only CKA if widths differ.

    Attributes:
        layers: kind -> one number for each of the student's layers, from layer 0; means over all frames.
        recordings: kind -> one number per recording; means over its frames and all layers.
        num_frames: frames of all recordings.
        teacher_layers: the teacher's layer that each of the student's was compared with.
    """

    layers: dict[str, list[float]]
    recordings: dict[str, list[float]]
    num_frames: int
    teacher_layers: list[int]


def kinds_of(student: EncoderConfig, teacher: EncoderConfig) -> tuple[str, ...]:
    """The kinds of distance between two encoders: only CKA if widths differ."""
    return KINDS if student.encoder_embed_dim == teacher.encoder_embed_dim else ("cka",)


def state_distances(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Distances between the states of one recording.

    Args:
        student, teacher: (T, D_S) and (T, D_T) per layer, equally many layers; T at least 4, for CKA.

    Returns:
        (kinds, layers) float64, in the order of :data:`KINDS`; only CKA if D_S and D_T differ. 1 - CKA is 1 if the
        student's frames vary too little for CKA.

    Raises:
        ValueError: numbers of layers or frames differ.
    """
    if [len(s) for s in student] != [len(t) for t in teacher]:
        raise ValueError(
            f"student states {[tuple(s.shape) for s in student]}, teacher states {[tuple(t.shape) for t in teacher]}: "
            "expected equal numbers of layers and frames"
        )
    columns = []
    for s, t in zip(student, teacher):
        s, t = s.double(), t.double()
        found = []
        if s.size(1) == t.size(1):
            normal_s, normal_t = F.layer_norm(s, s.shape[-1:]), F.layer_norm(t, t.shape[-1:])
            found = [
                (s - t).abs().mean(),
                (normal_s - normal_t).abs().mean(),
                1 - F.cosine_similarity(s, t, dim=-1).mean(),
            ]
        hsic = unbiased_hsic(s[None], t[None])
        varies = bool(hsic[0, 0] > 0)  # a layer may be pruned so far that its frames hardly differ
        columns.append(torch.stack([*found, cka_distance(hsic)[0, 1] if varies else hsic.new_ones(())]))
    return torch.stack(columns, dim=1)


@torch.no_grad()
def layer_distances(student: SpeechEncoder, teacher: SpeechEncoder, files: Iterable[Path]) -> LayerDistances:
    """Distances over recordings, each encoded separately, without padding; in pieces if longer than a minute.

    If depths differ, each of the student's layers is compared with the teacher's at the same relative depth. If a frame
    of the student covers several of the teacher's, it is compared with their mean.

    Args:
        student, teacher: the student's frames are as long as the teacher's, or a multiple; both are put in eval mode.
        files: audio, 16 kHz mono; unreadable files are skipped, and the log names them.

    Raises:
        ValueError: frame rates differ, no recording can be read, or one is too short for CKA.
    """
    student.eval()
    teacher.eval()
    rate = student.config.downsampling // teacher.config.downsampling
    kinds, depth = kinds_of(student.config, teacher.config), student.config.encoder_layers
    counterparts = [
        layer for (layer,) in map_groups([(i,) for i in range(depth + 1)], [depth], teacher.config.encoder_layers)
    ]
    found, frames = [], []
    for file, samples in readable(files, []):
        wave = samples[None]
        both = [F.layer_norm(wave, wave.shape[-1:]) if encoder.normalize else wave for encoder in (student, teacher)]
        parts, lengths = [], []
        for sources in zip(*(pieces(source, teacher.config.sample_rate) for source in both)):
            states = [
                [state[0] for state in encoder(source).hidden_states]
                for encoder, source in zip((student, teacher), sources)
            ]
            states[1] = [_merged(states[1][layer], rate) for layer in counterparts]
            if len(states[0][0]) < MIN_BLOCK:
                raise ValueError(f"{file}: {len(states[0][0])} frames, expected at least {MIN_BLOCK}; remove it")
            parts.append(state_distances(*states))
            lengths.append(len(states[0][0]))
        shares = torch.tensor(lengths, dtype=torch.float64) / sum(lengths)
        found.append(torch.einsum("n,nkl->kl", shares, torch.stack(parts)))
        frames.append(sum(lengths))
    if not found:
        raise ValueError("files: empty; expected at least one recording")
    table, weights = torch.stack(found), torch.tensor(frames, dtype=torch.float64)
    by_layer = torch.einsum("nkl,n->kl", table, weights / weights.sum())
    return LayerDistances(
        layers={kind: [round(v, 6) for v in row.tolist()] for kind, row in zip(kinds, by_layer)},
        recordings={kind: [round(v, 6) for v in row.tolist()] for kind, row in zip(kinds, table.mean(2).T)},
        num_frames=sum(frames),
        teacher_layers=counterparts,
    )


def _merged(state: Tensor, rate: int) -> Tensor:
    """(T, D) to (T // rate, D): means of ``rate`` frames each."""
    return state if rate < 2 else state[: len(state) // rate * rate].unflatten(0, (-1, rate)).mean(1)


def mean_over(values: Sequence[float], layers: Iterable[int]) -> float | None:
    """Mean over some layers; None without layers."""
    chosen = [values[layer] for layer in layers]
    return sum(chosen) / len(chosen) if chosen else None
