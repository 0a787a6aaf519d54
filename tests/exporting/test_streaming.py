"""What a user who streams must know: the smallest chunk, the hop, and that the encoder is not causal."""

from __future__ import annotations

import pytest
import torch
from messages import says


def seen(outputs: torch.Tensor, source: torch.Tensor) -> tuple[int, int]:
    """(first, last) sample of which a function of ``source`` (1, N) depends."""
    (gradient,) = torch.autograd.grad(outputs.square().sum(), source, retain_graph=True)
    used = gradient[0].nonzero().flatten()
    return int(used[0]), int(used[-1])


def test_a_frame_of_the_convolutions_sees_25_ms_every_20_ms(small):
    encoder = small.random_encoder(extractor_mode="layer_norm")
    assert (encoder.config.receptive_field, encoder.config.downsampling) == (400, 320)
    source = torch.randn(1, 5000, generator=torch.Generator().manual_seed(0)).requires_grad_()
    frames, _ = encoder.feature_extractor(source)
    assert frames.size(1) == (5000 - 400) // 320 + 1
    for t in (0, 1, 7, frames.size(1) - 1):
        assert seen(frames[:, t], source) == (320 * t, 320 * t + 399)
    projected = encoder(source).hidden_states[0]
    assert seen(projected[:, 3], source) == (960, 1359)


def test_group_norm_sees_the_whole_utterance(small):
    encoder = small.random_encoder(extractor_mode="default")
    source = torch.randn(1, 5000, generator=torch.Generator().manual_seed(0)).requires_grad_()
    frames, _ = encoder.feature_extractor(source)
    first, last = seen(frames[:, 0], source)
    assert first == 0 and last >= 4990  # samples that its first convolution leaves over at the end


@pytest.mark.parametrize("extractor", ["default", "layer_norm"])
def test_the_encoder_is_not_causal(small, extractor):
    encoder = small.random_encoder(extractor_mode=extractor)
    source = torch.randn(1, 320 * 99 + 400, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for state in encoder(source).hidden_states[1:]:
        assert seen(state[:, 0], source)[1] == source.size(1) - 1  # the first frame depends on the last sample


def test_the_smallest_chunk(small):
    encoder = small.random_encoder()
    for samples, frames in ((400, 1), (719, 1), (720, 2), (1039, 2), (1040, 3)):
        assert encoder(torch.randn(1, samples)).x.shape == (1, frames, 32)
    with pytest.raises(ValueError, match=says("399 samples", 400)):
        encoder(torch.randn(1, 399))
