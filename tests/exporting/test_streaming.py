"""Facts about streaming: the smallest chunk, the hop, and that the encoder is not causal."""

from __future__ import annotations

import pytest
import torch
from messages import says


def seen(outputs: torch.Tensor, source: torch.Tensor) -> tuple[int, int]:
    """(first, last) sample on which a function of ``source`` (1, N) depends."""
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
    assert first == 0 and last >= 4990  # samples that its first convolution drops at the end


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


@pytest.mark.parametrize("style", ["default", "layer_norm", "gated"])
def test_a_stream_with_all_of_the_audio_as_context_is_the_whole(small, style):
    changes = {"extractor_mode": "layer_norm"} if style == "layer_norm" else {}
    encoder = small.random_encoder(**changes, pruning_units=["conv", "heads"] if style == "gated" else [])
    if style == "gated":
        with torch.no_grad():
            encoder.gates.log_alpha[::5] = -5
    audio = torch.randn(50_123, generator=torch.Generator().manual_seed(0)).cumsum(0) / 50  # drifts far from its mean
    whole = encoder(audio[None])
    found = list(encoder.stream(audio.numpy(), chunk_seconds=1.0, context_seconds=60.0))
    assert [out.x.size(1) for out in found] == [50, 50, 50, 6]
    for a, b in zip(zip(*(out.hidden_states for out in found)), whole.hidden_states):
        torch.testing.assert_close(torch.cat(a, 1), b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([out.x for out in found], 1), whole.x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("extractor", ["default", "layer_norm"])
def test_the_convolutions_of_a_stream_are_those_of_the_whole(small, extractor, monkeypatch):
    monkeypatch.setattr("skill_fairseq.modules.encoder.BLOCK_SECONDS", 0.777)  # statistics of several blocks
    encoder = small.random_encoder(extractor_mode=extractor)
    audio = torch.randn(70_001, generator=torch.Generator().manual_seed(0))
    audio[:20_000] *= 0.01  # the parts differ
    with torch.no_grad():
        whole = encoder(audio[None]).hidden_states
    for chunk, context in ((0.5, 0.0), (1.0, 0.3), (100.0, 0.0), (0.02, 0.02)):
        found = [out.hidden_states for out in encoder.stream(audio, chunk, context, last_layer=0)]
        assert all(len(states) == 1 for states in found)
        torch.testing.assert_close(torch.cat([states[0] for states in found], 1), whole[0], rtol=1e-4, atol=1e-5)


def test_more_context_is_nearer_to_the_whole(small):
    encoder = small.random_encoder(extractor_mode="layer_norm")
    audio = torch.from_numpy(small.tone(8.0, seed=0))
    with torch.no_grad():
        whole = encoder(audio[None]).hidden_states[2]

    def error(context):
        found = torch.cat([out.hidden_states[2] for out in encoder.stream(audio, 1.0, context, last_layer=2)], 1)
        return float((found - whole).abs().mean() / whole.abs().mean())

    errors = [error(context) for context in (0.0, 0.5, 2.0, 8.0)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 10 * errors[3] and errors[3] < 1e-5


def test_what_a_stream_refuses(small):
    encoder = small.random_encoder()
    for audio, fields, said in (
        (torch.zeros(1, 4000), {}, ("audio", (1, 4000))),
        (torch.zeros(399), {}, ("399 samples", 400)),
        (torch.zeros(4000), {"chunk_seconds": 0.001}, ("chunk_seconds", 0.02)),
        (torch.zeros(4000), {"context_seconds": -1.0}, ("context_seconds", -1.0)),
    ):
        with pytest.raises(ValueError, match=says(*said)):
            next(encoder.stream(audio, **fields))
    with pytest.raises(ValueError, match=says("training mode", "eval()")):
        next(encoder.train().stream(torch.zeros(4000)))
