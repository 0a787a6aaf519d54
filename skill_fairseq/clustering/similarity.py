"""Distances between the layers of an encoder, measured in one pass over hidden states.

Definitions, for two layers with states x_f, y_f in R^D at the frames f = 1..N (padding left out):

=================  ====================================================================================
``cka``            1 - linear CKA of the centred states, exact (Kornblith et al. 2019, arXiv:1905.00414)
``cka_minibatch``  1 - linear CKA by the unbiased HSIC of blocks of frames (Nguyen et al. 2021,
                   arXiv:2010.15327), averaged over the blocks before the quotient is taken
``cosine``         mean over frames of 1 - cos(x_f, y_f)
``l1``             mean over frames and features of |x - y|
``l2``             root of the mean over frames and features of (x - y)^2: a Euclidean distance
``loss``           l1 + cosine, the distillation loss between the layers, shifted to be 0 where it is least
=================  ====================================================================================

Exact CKA is biased upwards until frames far outnumber features, and costs more than half a Base encoder's
forward pass on a CPU; the minibatch estimate is unbiased and, with all the others, costs about a tenth.
All sums are float64; no frames are kept beyond a buffer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from skill_fairseq.objectives.loss import without_padding

MEASURES = ("cka_minibatch", "cka", "cosine", "l1", "l2", "loss")
CHEAP_MEASURES = ("cka_minibatch", "cosine", "l1", "l2", "loss")

MIN_BLOCK = 4  # the unbiased HSIC divides by n (n - 3)


def unbiased_hsic(states: Tensor) -> Tensor:
    """Unbiased HSIC with linear kernels between all pairs of layers (Song et al. 2012).

    Computed as inner products of U-centred Gram matrices (Szekely and Rizzo 2014): the same numbers.

    Args:
        states: (S, n, D) float64 states of S layers at n >= 4 frames.

    Returns:
        (S, S) float64, symmetric.
    """
    n = states.size(1)
    gram = states @ states.transpose(1, 2)
    gram.diagonal(dim1=1, dim2=2).zero_()
    rows = gram.sum(2) / (n - 2)
    total = rows.sum(1) / (n - 1)
    gram += total[:, None, None] - rows[:, :, None] - rows[:, None, :]
    gram.diagonal(dim1=1, dim2=2).zero_()
    flat = gram.flatten(1)
    return flat @ flat.T / (n * (n - 3))


class LayerSimilarity:
    """Streaming distances between layers.

    Batches may be of any size: exact CKA and the per-frame measures do not depend on the order of the frames,
    and ``cka_minibatch`` cuts its blocks out of the stream of frames, wherever batches end. So that a block
    mixes utterances, the stream is buffered, and block b of the B in a buffer takes frames b, b + B, b + 2B,
    ...

    Args:
        measures: names out of :data:`MEASURES`.
        block_frames: n, frames of one HSIC estimate.
        buffer_blocks: B; the buffer holds up to ``n B (L + 1) D`` numbers of the states' own type.

    Memory beside the buffer: exact CKA keeps (L + 1)(L + 2)/2 D^2 doubles (0.4 GB for Base, 2.7 GB for
    Large), the other measures nothing to speak of.

    Example::

        similarity = LayerSimilarity(["cka_minibatch", "l2"])
        for source in audio:
            similarity.update(encoder(source).hidden_states)
        similarity.distances()["l2"]  # (L + 1, L + 1)

    Raises:
        ValueError: unknown measure, or blocks of fewer than 4 frames.
    """

    def __init__(
        self, measures: Sequence[str] = CHEAP_MEASURES, block_frames: int = 256, buffer_blocks: int = 16
    ) -> None:
        for measure in measures:
            if measure not in MEASURES:
                raise ValueError(f"measure: {measure!r} is unknown; choose from {', '.join(MEASURES)}")
        if block_frames < MIN_BLOCK or buffer_blocks < 1:
            raise ValueError(
                f"block_frames={block_frames}, buffer_blocks={buffer_blocks}: expected at least {MIN_BLOCK} and 1"
            )
        self.measures = tuple(measures)
        self.block_frames = block_frames
        self.buffer_blocks = buffer_blocks
        self.num_frames = 0
        self._shape = (0, 0)  # layers, features
        self._buffer: list[Tensor] = []
        self._buffered = 0

    def update(self, hidden_states: Sequence[Tensor], padding_mask: Tensor | None = None) -> None:
        """Takes the states of one batch.

        Args:
            hidden_states: L + 1 tensors (B, T, D), any floating type.
            padding_mask: (B, T) bool, True = padding, which does not count; None: there is none.

        Raises:
            ValueError: shapes that differ from layer to layer or from earlier batches, or states not finite.
        """
        shapes = {tuple(state.shape) for state in hidden_states}
        if len(shapes) != 1 or len(next(iter(shapes))) != 3:
            raise ValueError(f"hidden_states: shapes {sorted(shapes)}; expected one shape (B, T, D) for all layers")
        if padding_mask is None:
            frames = torch.stack([state.flatten(0, 1) for state in hidden_states])
        else:
            frames = torch.stack(without_padding(hidden_states, padding_mask))
        layers, count, features = frames.shape
        if self.num_frames == 0:
            self._start(layers, features, frames.device)
        if self._shape != (layers, features):
            raise ValueError(
                f"hidden_states: {layers} layers of {features} features after {self._shape[0]} of "
                f"{self._shape[1]}; use a new LayerSimilarity for another encoder"
            )
        self.num_frames += count
        self._add(frames)
        if not torch.isfinite(self._l1).all():
            bad = [i for i in range(layers) if not torch.isfinite(frames[i]).all()]
            raise ValueError(f"hidden_states: NaN or infinity in layers {bad}; check the audio and the teacher")
        if "cka_minibatch" in self.measures:
            self._fill(frames)

    def distances(self) -> dict[str, np.ndarray]:
        """The result so far; updates may go on after it.

        Returns:
            for every measure an (L + 1, L + 1) float64 matrix, symmetric, zero on the diagonal.

        Raises:
            ValueError: fewer than 4 frames so far, or a layer whose states are constant.
        """
        if self.num_frames < MIN_BLOCK:
            raise ValueError(f"similarity: {self.num_frames} frames; at least {MIN_BLOCK} are needed: add audio")
        numbers = self.num_frames * self._shape[1]
        found = {
            "cosine": 1.0 - self._cosine / self.num_frames,
            "l1": _square(self._l1 / numbers),
            "l2": _square((self._l2 / numbers).sqrt()),
        }
        found["loss"] = found["l1"] + found["cosine"]
        if "cka" in self.measures:
            found["cka"] = cka_distance(self._exact_hsic())
        if "cka_minibatch" in self.measures:
            rest = torch.cat(self._buffer, 1)[:, : self._buffered] if self._buffered else None
            hsic = self._hsic if rest is None else self._hsic + self._blocks(rest)
            found["cka_minibatch"] = cka_distance(hsic)
        return {measure: _as_distances(found[measure]) for measure in self.measures}

    def _start(self, layers: int, features: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self._shape = (layers, features)
        pairs = layers * (layers - 1) // 2
        self._l1, self._l2, self._cosine, self._hsic = zeros(pairs), zeros(pairs), *zeros(2, layers, layers)
        if "cka" in self.measures:
            self._sums = zeros(layers, features)
            # Row i: x_i^T [x_i x_{i+1} ... x_L].
            self._products = [zeros(features, (layers - i) * features) for i in range(layers)]

    def _add(self, frames: Tensor) -> None:
        """Per-frame measures and covariances of (L + 1, n, D) states."""
        # Few frames at a time, so that they stay in the processor's cache.
        for piece in frames.split(max(1, 8192 // self._shape[1]), dim=1):
            piece = piece.double()
            rows = piece.flatten(1)
            self._l1 += torch.pdist(rows, 1)
            self._l2 += torch.pdist(rows, 2).square()
            per_frame = piece.transpose(0, 1)
            products = per_frame @ per_frame.transpose(1, 2)
            norms = products.diagonal(dim1=1, dim2=2).sqrt().clamp_min(1e-8)
            self._cosine += (products / norms[:, :, None] / norms[:, None, :]).sum(0)
        if "cka" in self.measures:
            exact = frames.double()
            self._sums += exact.sum(1)
            side_by_side = exact.transpose(0, 1).flatten(1)
            for i, products in enumerate(self._products):
                products.addmm_(exact[i].T, side_by_side[:, i * self._shape[1] :])

    def _exact_hsic(self) -> Tensor:
        """Squared Frobenius norms of the cross-covariances (times the number of frames), (L + 1, L + 1)."""
        layers, features = self._shape
        hsic = self._sums.new_zeros(layers, layers)
        for i, products in enumerate(self._products):
            centred = products - torch.outer(self._sums[i], self._sums[i:].flatten()) / self.num_frames
            norms = centred.view(features, -1, features).square().sum((0, 2))
            hsic[i, i:] = norms
            hsic[i:, i] = norms
        return hsic

    def _fill(self, frames: Tensor) -> None:
        """Puts (L + 1, n, D) states into the buffer, and empties it whenever it is full."""
        size = self.block_frames * self.buffer_blocks
        for piece in self._pieces(frames, size):
            self._buffer.append(piece)
            self._buffered += piece.size(1)
            if self._buffered == size:
                self._hsic += self._blocks(torch.cat(self._buffer, 1))
                self._buffer, self._buffered = [], 0

    def _pieces(self, frames: Tensor, size: int) -> list[Tensor]:
        first = min(size - self._buffered, frames.size(1))
        return [frames[:, :first], *(frames[:, first:].split(size, 1) if first < frames.size(1) else ())]

    def _blocks(self, frames: Tensor) -> Tensor:
        """HSIC summed over interleaved blocks, weighted by frames: (L + 1, n, D) to (L + 1, L + 1)."""
        if frames.size(1) < MIN_BLOCK:  # 1 to 3 frames left at the very end of the stream
            return torch.zeros_like(self._hsic)
        blocks = max(1, frames.size(1) // self.block_frames)
        parts = [frames[:, b::blocks].double() for b in range(blocks)]
        return torch.stack([part.size(1) * unbiased_hsic(part) for part in parts]).sum(0)


def _square(pairs: Tensor) -> Tensor:
    """Distances of pairs i < j, row by row (P,), as a symmetric matrix with zero diagonal."""
    layers = round((1 + (1 + 8 * len(pairs)) ** 0.5) / 2)
    matrix = pairs.new_zeros(layers, layers)
    rows, columns = torch.triu_indices(layers, layers, 1, device=pairs.device)
    matrix[rows, columns] = pairs
    return matrix + matrix.T


def cka_distance(hsic: Tensor) -> Tensor:
    """1 - CKA from the HSIC of all pairs (L + 1, L + 1)."""
    own = hsic.diagonal()
    flat = [i for i, value in enumerate(own.tolist()) if not value > 0]
    if flat:
        raise ValueError(f"similarity: the states of layers {flat} do not vary enough for CKA; add audio")
    return 1.0 - hsic / torch.outer(own, own).sqrt()


def _as_distances(matrix: Tensor) -> np.ndarray:
    """Exactly symmetric, zero on the diagonal, and nowhere below zero by rounding or an estimate's noise."""
    result = ((matrix + matrix.T) / 2).clamp_min(0.0).cpu().numpy()
    np.fill_diagonal(result, 0.0)
    return result
