"""Codebooks, which replace a teacher's states by the indices of their nearest k-means centroids."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from skill_fairseq.checkpoints.plain_files import looks_like_safetensors
from skill_fairseq.checkpoints.safetensors_file import load_metadata, load_tensors
from skill_fairseq.files import PathLike, write_file
from skill_fairseq.modules.tf32 import exact_products

FILE = "codebook.safetensors"
_HEADER = "skill_codebook"


@dataclass(frozen=True)
class Codebook:
    """Centroids of the states of one layer.

    Several codebooks quantise one after another, each the residual of those before it (residual quantisation): the sum
    of the chosen centroids approximates the state.

    Attributes:
        centroids: (N, K, D) float32, K centroids of each of N codebooks, in the units of the states.
        scale: (D,) float32; features are divided by it before distances are computed; 1: no scaling.
        layer: the teacher's layer, from 0.
        teacher: name of the teacher's file or folder.
        teacher_sha256: its hash, see :func:`skill_fairseq.files.content_sha256`.
    """

    centroids: Tensor
    scale: Tensor
    layer: int
    teacher: str
    teacher_sha256: str

    def assign(self, states: Tensor) -> Tensor:
        """Quantises states.

        Args:
            states: (..., D), of any floating type.

        Returns:
            (..., N) int64 from 0 to K - 1: the nearest centroid in each codebook, the first in a tie.
        """
        return assign(states, self.centroids.to(states.device), self.scale.to(states.device))

    def save(self, path: PathLike) -> None:
        """Writes a safetensors file atomically."""
        about = {"layer": self.layer, "teacher": self.teacher, "teacher_sha256": self.teacher_sha256}
        tensors = {"centroids": self.centroids.contiguous(), "scale": self.scale.contiguous()}
        write_file(path, save(tensors, {_HEADER: json.dumps(about)}))


def assign(states: Tensor, centroids: Tensor, scale: Tensor) -> Tensor:
    """Nearest centroids, see :class:`Codebook`; without TF32, so that units are the same on every device."""
    middle, units = centroids[0].mean(0), []  # large means would cost precision of the distances
    rest = (states.float() - middle) / scale
    books = [(book - middle if n == 0 else book) / scale for n, book in enumerate(centroids)]
    with torch.autocast(states.device.type, enabled=False), exact_products(states.device):
        for book in books:
            # |x - c|^2 without |x|^2, which is the same for all.
            nearest = (book.square().sum(-1) - 2 * rest @ book.t()).argmin(-1)
            units.append(nearest)
            rest = rest - book[nearest]
    return torch.stack(units, -1)


def load_codebook(path: PathLike, field: str) -> Codebook:
    """Reads a codebook that ``skill-labels`` wrote.

    Args:
        path: the file.
        field: config field that names it, for messages.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a codebook, or is damaged.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"{field}: {file} does not exist; make it with skill-labels MANIFESTS --units kmeans --teacher FILE "
            "--layer N"
        )
    with open(file, "rb") as stream:
        known = looks_like_safetensors(stream.read(16))
    about = load_metadata(file).get(_HEADER) if known else None
    if about is None:
        raise ValueError(f"{field}: {file} is not a codebook; expected a {FILE} that skill-labels --units kmeans wrote")
    tensors, said = load_tensors(file), json.loads(about)
    centroids, scale = tensors["centroids"].float(), tensors["scale"].float()
    if centroids.dim() != 3 or scale.shape != centroids.shape[2:] or not bool((scale > 0).all()):
        raise ValueError(
            f"{field}: {file} has centroids {tuple(centroids.shape)} and scale {tuple(scale.shape)}; expected "
            "(N, K, D) and (D,) above 0; make it again with skill-labels"
        )
    return Codebook(centroids, scale, said["layer"], said["teacher"], said["teacher_sha256"])
