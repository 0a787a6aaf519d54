"""Distances between the layers of one or several encoders, in one pass over hidden states.

CKA compares layers of any width; the other measures subtract features, so all layers must have the same width.

Definitions, for two layers with states x_f, y_f in R^D at the frames f = 1..N (without padding):

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
forward pass on a CPU; the minibatch estimate is unbiased and, with all other measures, costs about a tenth.
All sums are float64; no frames are kept beyond a buffer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from skill_fairseq.objectives.loss import without_padding

MEASURES = ("cka_minibatch", "cka", "cosine", "l1", "l2", "loss")
CHEAP_MEASURES = ("cka_minibatch", "cosine", "l1", "l2", "loss")
OF_ANY_WIDTH = ("cka_minibatch", "cka")
"""Measures between layers that may differ in width."""

MIN_BLOCK = 4  # the unbiased HSIC divides by n (n - 3)


def check_widths(measures: Sequence[str], widths: Sequence[int]) -> None:
    """Raises:
    ValueError: layers differ in width, and a measure needs equal widths; names it.
    """
    unfit = [measure for measure in measures if measure not in OF_ANY_WIDTH]
    if unfit and len(set(widths)) > 1:
        raise ValueError(
            f"measure: {', '.join(unfit)}: needs layers of equal width, but they have {sorted(set(widths))}; choose "
            f"from {', '.join(OF_ANY_WIDTH)}"
        )


def unbiased_hsic(*states: Tensor) -> Tensor:
    """Unbiased HSIC with linear kernels between all pairs of layers (Song et al. 2012).

    Computed as inner products of U-centred Gram matrices (Szekely and Rizzo 2014): the same numbers.

    Args:
        states: (S_k, n, D_k) float64 states of S_k layers of width D_k at n >= 4 frames, S layers in all.

    Returns:
        (S, S) float64, symmetric.
    """
    n = states[0].size(1)
    gram = torch.cat([layers @ layers.transpose(1, 2) for layers in states])
    gram.diagonal(dim1=1, dim2=2).zero_()
    rows = gram.sum(2) / (n - 2)
    total = rows.sum(1) / (n - 1)
    gram += total[:, None, None] - rows[:, :, None] - rows[:, None, :]
    gram.diagonal(dim1=1, dim2=2).zero_()
    flat = gram.flatten(1)
    return flat @ flat.T / (n * (n - 3))


class LayerSimilarity:
    """Streaming distances between layers.

    Batches may have any size: exact CKA and the per-frame measures do not depend on the order of frames, and
    ``cka_minibatch`` cuts its blocks from the stream of frames, independent of batch boundaries. The stream is
    buffered so that blocks mix utterances: block b of the B in a buffer takes frames b, b + B, b + 2B, ...

    Args:
        measures: names from :data:`MEASURES`.
        block_frames: n, frames of one HSIC estimate.
        buffer_blocks: B; the buffer holds up to ``n B (L + 1) D`` numbers of the states' type.

    Memory beside the buffer: exact CKA keeps (L + 1)(L + 2)/2 D^2 doubles (0.4 GB for Base, 2.7 GB for
    Large), the other measures almost nothing.

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
        self._widths: tuple[int, ...] = ()  # features of each layer
        self._buffer: list[list[Tensor]] = []
        self._buffered = 0

    def update(self, hidden_states: Sequence[Tensor], padding_mask: Tensor | None = None) -> None:
        """Adds the states of one batch.

        Args:
            hidden_states: L + 1 tensors (B, T, D), any floating type; D may differ between layers for
                :data:`OF_ANY_WIDTH`. States of several encoders are concatenated.
            padding_mask: (B, T) bool, True = padding, which does not count, or None.

        Raises:
            ValueError: layers differ in frames, widths differ from earlier batches or cannot be compared by a measure,
                or states are not finite.
        """
        shapes = {tuple(state.shape) for state in hidden_states}
        if len({shape[:2] for shape in shapes}) != 1 or {len(shape) for shape in shapes} != {3}:
            raise ValueError(f"hidden_states: shapes {sorted(shapes)}; expected (B, T, D) with equal B and T")
        widths = tuple(state.size(2) for state in hidden_states)
        check_widths(self.measures, widths)
        if padding_mask is None:
            states = [state.flatten(0, 1) for state in hidden_states]
        else:
            states = without_padding(hidden_states, padding_mask)
        if self.num_frames == 0:
            self._start(widths, states[0].device)
        if self._widths != widths:
            new, old = (
                f"{len(w)} layers of {' and '.join(map(str, dict.fromkeys(w)))}" for w in (widths, self._widths)
            )
            raise ValueError(
                f"hidden_states: {new} features after {old}; use a new LayerSimilarity for another encoder"
            )
        bad = [i for i, state in enumerate(states) if not torch.isfinite(state).all()]
        if bad:
            raise ValueError(f"hidden_states: NaN or infinity in layers {bad}; check the audio and the teacher")
        frames = [torch.stack(list(same)) for _, same in itertools.groupby(states, key=lambda state: state.size(1))]
        self.num_frames += len(states[0])
        self._add(frames)
        if "cka_minibatch" in self.measures:
            self._fill(frames)

    def distances(self) -> dict[str, np.ndarray]:
        """The result so far; more updates may follow.

        Returns:
            for every measure a symmetric (L + 1, L + 1) float64 matrix with a zero diagonal.

        Raises:
            ValueError: fewer than 4 frames so far, or a layer whose states are constant.
        """
        if self.num_frames < MIN_BLOCK:
            raise ValueError(f"similarity: {self.num_frames} frames; at least {MIN_BLOCK} are needed: add audio")
        numbers = self.num_frames * self._widths[0]
        found = {
            "cosine": 1.0 - self._cosine / self.num_frames,
            "l1": _square(self._l1 / numbers),
            "l2": _square((self._l2 / numbers).sqrt()),
        }
        found["loss"] = found["l1"] + found["cosine"]
        if "cka" in self.measures:
            found["cka"] = cka_distance(self._exact_hsic())
        if "cka_minibatch" in self.measures:
            hsic = self._hsic + self._blocks() if self._buffered else self._hsic
            found["cka_minibatch"] = cka_distance(hsic)
        return {measure: _as_distances(found[measure]) for measure in self.measures}

    def _start(self, widths: tuple[int, ...], device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self._widths, layers = widths, len(widths)
        pairs = layers * (layers - 1) // 2
        self._l1, self._l2, self._cosine, self._hsic = zeros(pairs), zeros(pairs), *zeros(2, layers, layers)
        if "cka" in self.measures:
            self._sums = zeros(sum(widths))
            # Row i: x_i^T [x_i x_{i+1} ... x_L].
            self._products = [zeros(width, sum(widths[i:])) for i, width in enumerate(widths)]

    def _add(self, frames: Sequence[Tensor]) -> None:
        """Adds per-frame measures (if all widths are equal) and covariances of states (S_k, n, D_k)."""
        # A few frames at a time, so that they stay in the processor's cache.
        for piece in frames[0].split(max(1, 8192 // self._widths[0]), dim=1) if len(frames) == 1 else ():
            piece = piece.double()
            rows = piece.flatten(1)
            self._l1 += torch.pdist(rows, 1)
            self._l2 += torch.pdist(rows, 2).square()
            per_frame = piece.transpose(0, 1)
            products = per_frame @ per_frame.transpose(1, 2)
            norms = products.diagonal(dim1=1, dim2=2).sqrt().clamp_min(1e-8)
            self._cosine += (products / norms[:, :, None] / norms[:, None, :]).sum(0)
        if "cka" in self.measures:
            side_by_side = torch.cat([layers.double().transpose(0, 1).flatten(1) for layers in frames], 1)
            self._sums += side_by_side.sum(0)
            for own, right, products in zip(
                side_by_side.split(self._widths, 1), self._right(side_by_side), self._products
            ):
                products.addmm_(own.T, right)

    def _right(self, side_by_side: Tensor) -> Iterator[Tensor]:
        """Slices of all layers' features in the last dimension: for each layer, its own and all later ones."""
        for start in itertools.accumulate((0, *self._widths[:-1])):
            yield side_by_side[..., start:]

    def _exact_hsic(self) -> Tensor:
        """Squared Frobenius norms of the cross-covariances (times the number of frames), (L + 1, L + 1)."""
        layers = len(self._widths)
        hsic = self._sums.new_zeros(layers, layers)
        rows = zip(self._sums.split(self._widths), self._right(self._sums), self._products)
        for i, (own, right, products) in enumerate(rows):
            centred = products - torch.outer(own, right) / self.num_frames
            norms = torch.stack([part.square().sum() for part in centred.split(self._widths[i:], 1)])
            hsic[i, i:] = norms
            hsic[i:, i] = norms
        return hsic

    def _fill(self, frames: Sequence[Tensor]) -> None:
        """Adds (S_k, n, D_k) states to the buffer, and processes it whenever it is full."""
        size, start, count = self.block_frames * self.buffer_blocks, 0, frames[0].size(1)
        while start < count:
            end = min(start + size - self._buffered, count)
            self._buffer.append([layers[:, start:end] for layers in frames])
            self._buffered += end - start
            start = end
            if self._buffered == size:
                self._hsic += self._blocks()
                self._buffer, self._buffered = [], 0

    def _blocks(self) -> Tensor:
        """HSIC of the buffer, (L + 1, L + 1), summed over interleaved blocks, weighted by frames."""
        if self._buffered < MIN_BLOCK:  # 1 to 3 frames left at the very end of the stream
            return torch.zeros_like(self._hsic)
        frames = [torch.cat(pieces, 1) for pieces in zip(*self._buffer)]
        blocks = max(1, self._buffered // self.block_frames)
        parts = [[layers[:, b::blocks].double() for layers in frames] for b in range(blocks)]
        return torch.stack([part[0].size(1) * unbiased_hsic(*part) for part in parts]).sum(0)


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
    """Makes a matrix exactly symmetric with a zero diagonal, and clips negative values from rounding or noise to 0."""
    result = ((matrix + matrix.T) / 2).clamp_min(0.0).cpu().numpy()
    np.fill_diagonal(result, 0.0)
    return result
