"""Masked frames: their number, and that they depend only on seed and utterance."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from messages import says
from omegaconf import OmegaConf

from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.masking import HideFrames, with_masks
from skill_fairseq.modules.padding import frame_padding_mask
from skill_fairseq.modules.taps import SpanMasking, Tap
from skill_fairseq.objectives.masking import MaskingConfig, draw_masks, draw_spans, masked_frames, parse_masking
from skill_fairseq.objectives.teacher import FrozenTeacher
from tests.conftest import SHAPE, random_encoder, waves

PUBLISHED = {"mask_length": 10, "mask_selection": "uniform", "no_mask_overlap": True}
SPANS = SpanMasking(0.4, 3, "uniform", no_overlap=True)


def parse(**fields: Any) -> Any:
    return parse_masking(OmegaConf.merge(OmegaConf.structured(MaskingConfig), fields), "criterion.objectives.a")


def lengths(mask: np.ndarray, masked: bool) -> list[int]:
    """Lengths of the runs of masked frames, or of the gaps between them."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(int)))
    return (edges[1::2] - edges[::2] if masked else edges[2::2] - edges[1:-1:2]).tolist()


@pytest.mark.parametrize(("prob", "share"), [(0.8, 0.78), (0.4, 0.40)])
def test_the_published_masks_hide_the_published_share(prob: float, share: float) -> None:
    """MaskHuBERT's masking of 15.6 s utterances: spans of up to 20 frames that do not touch."""
    masking = parse(mask_prob=prob, **PUBLISHED)
    masks = [draw_spans(masking, 780, [1, 1, i]) for i in range(40)]
    assert np.mean(masks) == pytest.approx(share, abs=0.02)
    for mask in masks:
        assert max(lengths(mask, True)) <= 20 and min(lengths(mask, False)) >= 1
        assert 1 < len(lengths(mask, True))
    assert len({mask.tobytes() for mask in masks}) == 40


def test_another_thread_may_seed_numpy_meanwhile() -> None:
    """fairseq's trainer does so in every update, while its loader draws ahead in another thread."""
    wanted = [draw_spans(SPANS, 300, [1, i]).tolist() for i in range(20)]
    done = threading.Event()

    def disturb() -> None:
        while not done.is_set():
            np.random.seed(0)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        assert all([draw_spans(SPANS, 300, [1, i]).tolist() for i in range(20)] == wanted for _ in range(2))
    finally:
        done.set()
        thread.join()


def test_a_draw_depends_on_its_seed_alone_and_leaves_numpys_state() -> None:
    np.random.seed(7)
    wanted = np.random.rand(3)
    np.random.seed(7)
    first = draw_spans(SPANS, 100, [2**40, 3, 5])
    assert (np.random.rand(3) == wanted).all()
    np.random.seed(8)
    assert (draw_spans(SPANS, 100, [2**40, 3, 5]) == first).all()
    assert (draw_spans(SPANS, 100, [2**40, 4, 5]) != first).any()


@pytest.mark.parametrize("fields", [PUBLISHED, {}, {"mask_selection": "normal", "mask_other": 4.0}])
@pytest.mark.parametrize("frames", [0, 1, 2, 5, 11, 21])
def test_short_utterances_have_masks_where_there_is_room(fields: Any, frames: int) -> None:
    masks = [draw_spans(parse(mask_prob=0.8, **fields), frames, [1, i]) for i in range(50)]
    assert {mask.shape for mask in masks} == {(frames,)} and {mask.dtype for mask in masks} == {np.dtype(bool)}
    assert frames < 5 or any(mask.any() for mask in masks)


def test_masks_of_an_utterance_do_not_depend_on_its_batch_and_never_hit_padding() -> None:
    config = EncoderConfig(**SHAPE)
    padding = torch.zeros(3, 32000, dtype=torch.bool)
    padding[1, 20000:] = padding[2, 9000:] = True
    seeds = [[1, 2, i] for i in range(3)]
    other = SpanMasking(0.2)
    found = draw_masks([SPANS, other], config, 32000, padding, seeds)
    assert list(found) == [SPANS, other] and found[SPANS].shape == (3, config.num_frames(32000))
    frames = frame_padding_mask(padding, config.num_frames(32000), config)
    assert all(mask.any(1).all() and not (mask & frames).any() for mask in found.values())
    (alone,) = draw_masks([SPANS], config, 32000, padding[1:2], seeds[1:2]).values()
    assert torch.equal(alone, found[SPANS][1:2])
    whole = draw_masks([SPANS], config, 32000, None, seeds)[SPANS]
    assert torch.equal(whole[0], found[SPANS][0]) and not torch.equal(whole[1], found[SPANS][1])


def test_what_an_objective_finds_in_a_batch() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert masked_frames({"masked": {SPANS: mask}}, SPANS) is mask
    for sample in (None, {}, {"masked": {SPANS: mask}}):
        assert masked_frames(sample, SpanMasking(0.1)) is None and masked_frames(sample, None) is None


def test_hidden_frames_become_the_embedding_in_one_pass() -> None:
    """Any values there, even NaN, are replaced; other frames and their gradients do not change."""
    mask = torch.tensor([[True, False, False], [False, True, True]])
    x = torch.randn(2, 3, 4)
    x[0, 0] = float("nan")
    x.requires_grad_()
    embedding = torch.randn(4, requires_grad=True)
    taps = [Tap((1,), masking=SPANS), Tap((2,), masking=SPANS), Tap((2,)), Tap((1,), masking=SpanMasking(0.1))]
    bound = with_masks(taps, {SPANS: mask}, embedding)
    assert [tap.layers for tap in bound] == [tap.layers for tap in taps] and not any(tap.masking for tap in bound)
    assert bound[0].transform is bound[1].transform is not None
    assert bound[2] == taps[2] and bound[3].transform is None  # not drawn: it is not masked
    hidden = bound[0].transform(x, None)
    assert torch.equal(hidden[mask], embedding.expand(3, 4)) and torch.equal(hidden[~mask], x[~mask])
    hidden.sum().backward()
    assert torch.equal(embedding.grad, torch.full((4,), 3.0))
    assert torch.equal(x.grad, (~mask)[..., None].expand_as(x).float())
    assert with_masks(taps[:1], {}, None) == [Tap((1,))]
    with pytest.raises(ValueError, match="no mask embedding"):
        with_masks(taps, {SPANS: mask}, None)
    with pytest.raises(ValueError, match=says("masked", "(2, 3)", "(2, 5, 4)", "equally many frames")):
        HideFrames(mask, embedding)(torch.zeros(2, 5, 4))


def test_a_teacher_hears_an_utterance_whole_and_masked_at_once() -> None:
    """Each gives the same as alone, with its own embedding."""
    encoder, source = random_encoder(), waves(8000)
    encoder.mask_embedding = torch.randn(32)
    mask = torch.zeros(2, 24, dtype=torch.bool)
    mask[0, 3:9] = mask[1, 20:] = True
    whole, hidden = FrozenTeacher(encoder).tap(source, None, [Tap((2,)), Tap((2,), masking=SPANS)], {SPANS: mask})
    with torch.no_grad():
        wanted = encoder(source, transform=HideFrames(mask, encoder.mask_embedding), last_layer=2).hidden_states
        assert torch.equal(hidden, wanted[2])
        assert torch.equal(whole, encoder(source, last_layer=2).hidden_states[2])
    assert (hidden - whole).abs().max() > 0.1
    low = FrozenTeacher(encoder, "bf16").tap(source, None, [Tap((2,), masking=SPANS)], {SPANS: mask})[0]
    assert low.dtype == torch.float32 and (low - hidden).abs().max() < 0.3


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"mask_length": 5}, ["mask_length", 5, "mask_prob=0", "leave it out"]),
        ({"mask_prob": 1.5}, ["mask_prob", 1.5, "0 to 1"]),
        ({"mask_prob": -0.5}, ["mask_prob", -0.5, "0 to 1"]),
        ({"mask_prob": 0.5, "mask_length": 0}, ["mask_length", 0, "at least 1"]),
        ({"mask_prob": 0.5, "mask_selection": "long"}, ["mask_selection", "long", "static, uniform"]),
        ({"mask_prob": 0.5, "mask_other": 21.0}, ["mask_other", 21.0, "twice mask_length"]),
        ({"mask_prob": 0.5, "mask_min_space": 0}, ["mask_min_space", 0, "at least 1"]),
    ],
)
def test_what_is_refused(fields: dict, said: list) -> None:
    with pytest.raises(ValueError, match=says("criterion.objectives.a." + said[0], *said[1:])):
        parse(**fields)
    assert parse() is None
