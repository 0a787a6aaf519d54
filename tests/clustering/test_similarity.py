"""Every measure against a computation on all frames, and its properties."""

import numpy as np
import pytest
import torch
from messages import says
from torch.testing import assert_close

from skill_fairseq.clustering.similarity import MEASURES, LayerSimilarity, unbiased_hsic
from skill_fairseq.objectives.loss import distillation_loss

LAYERS, FEATURES = 4, 6


def states(frames: int, seed: int = 0) -> torch.Tensor:
    """(LAYERS, frames, FEATURES): each layer is the previous one, rotated, shifted and disturbed."""
    generator = torch.Generator().manual_seed(seed)
    layers = [torch.randn(frames, FEATURES, generator=generator)]
    for i in range(1, LAYERS):
        turn = torch.randn(FEATURES, FEATURES, generator=generator)
        noise = torch.randn(frames, FEATURES, generator=generator)
        layers.append(0.6 * layers[-1] @ turn + i + noise)
    return torch.stack(layers)


def measured(parts, measures=MEASURES, **options):
    similarity = LayerSimilarity(measures, **options)
    for part in parts:
        similarity.update(list(part))
    return similarity.distances()


def in_batches(frames: torch.Tensor, *sizes: int):
    """(L, N, D) as batches (L, B, T, D) of T = 5 with the given B, and the rest as one row."""
    start = 0
    for size in sizes:
        yield frames[:, start : start + 5 * size].unflatten(1, (size, 5))
        start += 5 * size
    if start < frames.size(1):
        yield frames[:, start:].unsqueeze(1)


def exact_cka(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """From centred Gram matrices of all frames (Kornblith et al. 2019, eq. 3), not from covariances."""
    n = len(x)
    centring = torch.eye(n, dtype=torch.float64) - 1 / n

    def hsic(a, b):
        return torch.trace(a @ a.T @ centring @ b @ b.T @ centring)

    return hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()


def hsic_1(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The definition (Nguyen et al. 2021): Gram matrices without their diagonals, three terms."""
    n = len(x)
    k, m = x @ x.T, y @ y.T
    k.fill_diagonal_(0)
    m.fill_diagonal_(0)
    ones = torch.ones(n, dtype=x.dtype)
    second = (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
    return (torch.trace(k @ m) + second - 2 * (ones @ k @ m @ ones) / (n - 2)) / (n * (n - 3))


BRUTE_FORCE = {
    "cka": lambda x, y: 1 - exact_cka(x, y),
    "cosine": lambda x, y: (1 - (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))).mean(),
    "l1": lambda x, y: (x - y).abs().mean(),
    "l2": lambda x, y: (x - y).square().mean().sqrt(),
    "loss": lambda x, y: distillation_loss(x[None], y[None]).total + 1,
}


@pytest.mark.parametrize("measure", BRUTE_FORCE)
def test_equals_brute_force(measure):
    frames = states(103)
    found = measured(in_batches(frames, 3, 7, 1))[measure]
    layers = frames.double()
    expected = np.array([[float(BRUTE_FORCE[measure](x, y)) for y in layers] for x in layers])
    np.fill_diagonal(expected, 0)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_unbiased_hsic_equals_its_definition():
    frames = states(9).double()
    expected = torch.stack([torch.stack([hsic_1(x, y) for y in frames]) for x in frames])
    assert_close(unbiased_hsic(frames), expected, rtol=1e-10, atol=0)


def test_minibatch_cka_averages_interleaved_blocks():
    frames = states(50).double()
    found = measured(in_batches(frames, 3, 2), ["cka_minibatch"], block_frames=10, buffer_blocks=2)
    # Two buffers of 20 frames, each divided by taking every second frame; the last 10 form their own block.
    blocks = [frames[:, start + b : start + 20 : 2] for start in (0, 20) for b in (0, 1)] + [frames[:, 40:]]
    hsic = sum(torch.stack([torch.stack([hsic_1(x, y) for y in block]) for x in block]) for block in blocks)
    own = hsic.diagonal().sqrt()
    expected = (1 - hsic / torch.outer(own, own)).numpy()
    np.fill_diagonal(expected, 0)
    np.testing.assert_allclose(found["cka_minibatch"], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("measure", MEASURES)
def test_batch_sizes_change_nothing(measure):
    frames = states(203)
    options = {"block_frames": 16, "buffer_blocks": 3}
    whole = measured([frames[:, None]], **options)[measure]
    one_by_one = measured((frames[:, i : i + 1, None] for i in range(203)), **options)[measure]
    batches = measured(in_batches(frames, 1, 20, 4, 9), **options)[measure]
    np.testing.assert_allclose(one_by_one, whole, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(batches, whole, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("measure", [m for m in MEASURES if m != "cka_minibatch"])
def test_order_of_frames_changes_nothing(measure):
    frames = states(97)
    order = torch.randperm(97, generator=torch.Generator().manual_seed(1))
    shuffled = measured([frames[:, order][:, None]])[measure]
    np.testing.assert_allclose(shuffled, measured([frames[:, None]])[measure], rtol=1e-9)


@pytest.mark.parametrize("measure", MEASURES)
def test_padding_does_not_count(measure):
    frames = states(30)
    batch = frames.unflatten(1, (3, 10)).clone()
    mask = torch.zeros(3, 10, dtype=torch.bool)
    mask[1, 6:] = True
    batch[:, mask] = float("nan")
    padded = LayerSimilarity(MEASURES)
    padded.update(list(batch), mask)
    kept = torch.cat([frames[:, :16], frames[:, 20:]], 1)
    assert padded.num_frames == 26
    np.testing.assert_allclose(padded.distances()[measure], measured([kept[:, None]])[measure], rtol=1e-9)


@pytest.mark.parametrize("measure", MEASURES)
def test_matrix_is_a_distance_matrix(measure):
    matrix = measured([states(60)[:, None]])[measure]
    assert matrix.shape == (LAYERS, LAYERS) and matrix.dtype == np.float64
    assert (matrix == matrix.T).all() and (matrix.diagonal() == 0).all()
    assert (matrix[~np.eye(LAYERS, dtype=bool)] > 0).all()


@pytest.mark.parametrize("measure", ["cka", "cka_minibatch"])
def test_cka_ignores_turning_scaling_and_shifting(measure):
    first = states(80)[0].double()
    turn, _ = torch.linalg.qr(torch.randn(FEATURES, FEATURES, generator=torch.Generator().manual_seed(2)).double())
    turned = 3.7 * first @ turn + 5
    distance = measured([torch.stack([first, turned])[:, None]], [measure])[measure][0, 1]
    assert distance == pytest.approx(0, abs=1e-10)
    skewed = first * torch.linspace(0.1, 3, FEATURES)  # not isotropic: this does matter
    assert measured([torch.stack([first, skewed])[:, None]], [measure])[measure][0, 1] > 0.05


def test_only_the_minibatch_estimate_is_unbiased():
    """Independent layers have a CKA of 0, but a small sample's is far from it."""
    pairs = torch.randn(2, 1, 512, 256, generator=torch.Generator().manual_seed(3))
    found = measured([pairs], ["cka", "cka_minibatch"], block_frames=64)
    assert found["cka"][0, 1] < 0.75
    assert found["cka_minibatch"][0, 1] == pytest.approx(1, abs=0.02)


def test_reading_the_result_does_not_end_the_stream():
    frames = states(70)
    options = {"block_frames": 8, "buffer_blocks": 4}
    similarity = LayerSimilarity(MEASURES, **options)
    for part in frames[:, None].split(30, dim=2):
        similarity.update(list(part))
        similarity.distances()
    expected = measured([frames[:, None]], **options)
    for measure, matrix in similarity.distances().items():
        np.testing.assert_allclose(matrix, expected[measure], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("measure", ["cka", "cka_minibatch"])
def test_layers_of_several_widths(measure):
    """As with two encoders; equal to the definition for each pair."""
    generator = torch.Generator().manual_seed(1)
    narrow, wide = states(90), states(90, seed=1) @ torch.randn(FEATURES, 11, generator=generator)
    layers = [*narrow, *(wide + 0.5 * torch.randn(wide.shape, generator=generator)), narrow[1] * 2]
    similarity = LayerSimilarity([measure], block_frames=15, buffer_blocks=2)
    for start, end in ((0, 40), (40, 47), (47, 90)):
        similarity.update([layer[None, start:end] for layer in layers])
    found = similarity.distances()[measure]
    layers = [layer.double() for layer in layers]
    if measure == "cka":
        expected = torch.tensor([[1 - exact_cka(x, y) for y in layers] for x in layers])
    else:
        blocks = [slice(30 * full + b, 30 * full + 30, 2) for full in range(3) for b in range(2)]
        hsic = torch.tensor([[sum(hsic_1(x[part], y[part]) for part in blocks) for y in layers] for x in layers])
        expected = 1 - hsic / torch.outer(hsic.diagonal(), hsic.diagonal()).sqrt()
    np.testing.assert_allclose(found, expected.clamp_min(0).fill_diagonal_(0).numpy(), rtol=1e-9, atol=1e-12)
    assert found[1, -1] == pytest.approx(0, abs=1e-12) and 0.01 < found[0, 5] < 1


def test_measures_that_need_one_width_are_refused_by_name():
    similarity = LayerSimilarity(["cka", "l2", "cosine"])
    with pytest.raises(ValueError, match=says("measure", "l2", "cosine", "[6, 7]", "cka_minibatch")):
        similarity.update([torch.randn(1, 9, 6), torch.randn(1, 9, 7)])
    with pytest.raises(ValueError, match=says("hidden_states", "(1, 8, 7)")):
        LayerSimilarity(["cka"]).update([torch.randn(1, 9, 6), torch.randn(1, 8, 7)])


def test_clear_errors():
    frames = states(8)
    with pytest.raises(ValueError, match=says("measure", "'euclid'", "cka_minibatch")):
        LayerSimilarity(["euclid"])
    with pytest.raises(ValueError, match=says("similarity", "3 frames", "at least 4")):
        measured([frames[:, None, :3]])
    with pytest.raises(ValueError, match=says("similarity", "0 frames")):
        LayerSimilarity().distances()
    broken = frames.clone()
    broken[2, 5, 1] = float("nan")
    with pytest.raises(ValueError, match=says("NaN", "layers [2]")):
        measured([broken[:, None]])
    with pytest.raises(ValueError, match=says("5 features", 6)):
        measured([frames[:, None], frames[:, None, :, :5]])
    flat = frames.clone()
    flat[1] = 2.5
    with pytest.raises(ValueError, match=says("layers [1]", "vary", "CKA")):
        measured([flat[:, None]], ["cka"])


def test_memory_does_not_grow_with_the_audio() -> None:
    """Memory after 50 batches equals that after 10: sums, and a buffer of fixed size."""

    def held(similarity: LayerSimilarity) -> int:
        tensors = [t for value in vars(similarity).values() for t in (value if isinstance(value, list) else [value])]
        return sum(t.numel() for t in tensors if isinstance(t, torch.Tensor))

    similarity = LayerSimilarity(MEASURES, block_frames=16, buffer_blocks=2)
    generator = torch.Generator().manual_seed(0)
    sizes = []
    for _ in range(50):
        similarity.update([torch.randn(2, 24, 8, generator=generator) for _ in range(4)])
        sizes.append(held(similarity))
    assert max(sizes[10:]) <= max(sizes[:10])
    assert max(sizes) <= 32 * 4 * 8 + 4 * 4 * 3 + 4 * 8 + 8 * 8 * 10 + 12
