"""Taps: an encoder's results, their cost, and the path with attention maps against the fast one."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from messages import says
from torch import Tensor

from skill_fairseq.modules.attention import SelfAttention
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.taps import Tap, collect
from tests.conftest import LARGE_STYLE, random_encoder
from tests.modules.test_fast_path import STYLES, batch, set_gates, units_of


def states(layers: int, *shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(layers + 1)]


def means(hidden: Any, *groups: tuple[int, ...]) -> list[Tensor]:
    return collect([Tap(group) for group in groups], ((state, None) for state in hidden))


def test_means_over_layers() -> None:
    hidden = states(4, 2, 3, 5)
    first, second, third, again = means(hidden, (0,), (4, 1, 2), (3,), (1, 3))
    assert first is hidden[0] and third is hidden[3]
    torch.testing.assert_close(second, (hidden[1] + hidden[2] + hidden[4]) / 3)
    torch.testing.assert_close(again, (hidden[1] + hidden[3]) / 2)


def test_means_leave_the_states_and_pass_gradients() -> None:
    hidden = [state.requires_grad_() for state in states(3, 1, 2, 2)]
    before = [state.detach().clone() for state in hidden]
    (mean,) = means(hidden, (1, 3))
    mean.sum().backward()
    assert all(torch.equal(state, copy) for state, copy in zip(hidden, before))
    assert hidden[0].grad is None and hidden[2].grad is None
    for layer in (1, 3):
        assert torch.equal(hidden[layer].grad, torch.full_like(hidden[layer], 0.5))


def test_means_of_float16_do_not_overflow() -> None:
    (mean,) = means([torch.full((1, 1, 2), 60000.0, dtype=torch.float16)] * 4, (0, 1, 2, 3))
    assert mean.dtype == torch.float16 and mean.tolist() == [[[60000.0, 60000.0]]]


def test_states_are_not_kept_without_gradients() -> None:
    alive: list[weakref.ref] = []
    most = 0

    def made() -> Any:
        nonlocal most
        for i in range(20):
            state = torch.full((1, 4, 2), float(i))
            alive.append(weakref.ref(state))
            yield state, None
            del state
            most = max(most, sum(ref() is not None for ref in alive))

    with torch.no_grad():
        (mean,) = collect([Tap(tuple(range(20)))], made())
    assert torch.equal(mean, torch.full((1, 4, 2), 9.5))
    assert most <= 2


@pytest.mark.parametrize("gradients", [True, False])
def test_no_layer_beyond_the_deepest_runs(gradients: bool) -> None:
    encoder = random_encoder()
    ran: list[int] = []
    for i, layer in enumerate(encoder.transformer.layers, start=1):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    with torch.set_grad_enabled(gradients):
        for taps, wanted in (([Tap((0,))], []), ([Tap((0, 2)), Tap((1,))], [1, 2]), ([Tap((1,), "maps")], [1])):
            ran.clear()
            encoder.tap(batch(torch.float32)[0], None, taps)
            assert ran == wanted


def test_maps_that_nobody_asks_for_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = random_encoder()
    made: list[int] = []
    whole = SelfAttention.attend_with_maps
    monkeypatch.setattr(SelfAttention, "attend_with_maps", lambda self, *a: (made.append(1), whole(*a))[1])
    source, mask = batch(torch.float32)
    encoder(source, mask)
    encoder.tap(source, mask, [Tap((1, 2, 3))])
    assert made == []
    encoder.tap(source, mask, [Tap((3,)), Tap((1, 2), "mean_map"), Tap((2,), "maps")])
    assert made == [1, 1]


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("openness", [None, 3.0, -1.0, -9.0])
@pytest.mark.parametrize("style", STYLES)
def test_asking_for_maps_changes_no_output_and_no_gradient(style: str, openness: float | None, padded: bool) -> None:
    shape = STYLES[style]
    encoder = random_encoder(**shape, pruning_units=[] if openness is None else units_of(shape)).double().train()
    generator = None if openness is None else set_gates(encoder, openness)
    source, mask = batch(torch.float64)
    numbers = torch.Generator().manual_seed(3)
    found: list[tuple[list[Tensor], dict[str, Tensor]]] = []
    asked = [Tap((layer,)) for layer in range(4)]
    for extra in ([], [Tap((layer,), "maps") for layer in (1, 2, 3)]):
        encoder.zero_grad(set_to_none=True)
        if generator is not None:
            generator.manual_seed(7)
        out, _ = encoder.tap(source, mask if padded else None, [*asked, *extra])
        numbers.manual_seed(3)
        out = out[:4]
        sum((s * torch.randn(s.shape, generator=numbers, dtype=s.dtype)).sum() for s in out).backward()  # type: ignore[union-attr]
        gradients = {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}
        found.append(([s.detach() for s in out], gradients))
    (fast, gradients), (slow, others) = found
    for one, other in zip(fast, slow):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():  # gates are float32, and their gradients are rounded to that
        rounding = 2e-6 if name.endswith("log_alpha") else 1e-9
        assert (gradient - others[name]).abs().max() <= rounding * gradient.abs().max().clamp(min=1.0), name


def textbook_map(encoder: SpeechEncoder, x: Tensor, mask: Tensor) -> Tensor:
    """(B, H, T, T) attention of the first layer, computed by element."""
    layer, table = encoder.transformer.layers[0], encoder.transformer.relative_position
    assert layer.attention is not None
    frames, heads = x.size(1), encoder.config.encoder_attention_heads
    x = layer.attention_norm(x) if layer.layer_norm_first else x
    q, k = (p(x).view(len(x), frames, heads, -1) for p in (layer.attention.q_proj, layer.attention.k_proj))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.size(3) ** 0.5
    if table is not None:
        assert layer.attention.position_gate is not None
        factor = layer.attention.position_gate(x, torch.arange(heads))
        bias = torch.stack([table(frames)[:, frames - 1 - j + i] for i in range(frames) for j in range(frames)], 1)
        scores = scores + factor * bias.view(heads, frames, frames)
    return scores.masked_fill(mask[:, None, None, :], float("-inf")).softmax(-1)


@pytest.mark.parametrize("style", [style for style in STYLES if "heads" in units_of(STYLES[style])])
def test_maps_are_the_softmax_of_the_textbook(style: str) -> None:
    encoder = random_encoder(**STYLES[style], pruning_units=["heads"]).double()
    first = dict(encoder.named_gates())["transformer.layers.0.attention.gate"]
    with torch.no_grad():
        first.log_alpha[1] = -9.0  # closed in evaluation
    source, samples_mask = batch(torch.float64)
    seen: list[Tensor] = []
    encoder.transformer.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    (maps, mean), mask = encoder.tap(source, samples_mask, [Tap((1,), "maps"), Tap((1,), "mean_map")])
    assert mask is not None and mask.any()
    wanted = textbook_map(encoder, seen[0], mask)
    torch.testing.assert_close(maps, wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(mean, wanted[:, [0, 2, 3]].mean(1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(mean.sum(-1), torch.ones_like(mean[..., 0]))
    mean[..., 0].square().sum().backward()
    layer = encoder.transformer.layers[0].attention
    assert layer is not None
    by_head = layer.q_proj.weight.grad.view(4, -1).abs().sum(1)  # type: ignore[union-attr]
    assert by_head[1] == 0 and by_head[[0, 2, 3]].min() > 0


def test_a_closed_layer_has_the_mean_of_all_its_heads() -> None:
    encoder = random_encoder(pruning_units=["heads"])
    with torch.no_grad():
        dict(encoder.named_gates())["transformer.layers.1.attention.gate"].log_alpha.fill_(-9.0)
    (maps, mean), _ = encoder.tap(batch(torch.float32)[0], None, [Tap((2,), "maps"), Tap((2,), "mean_map")])
    torch.testing.assert_close(mean, maps.mean(1))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_maps_have_gradients_with_activation_checkpointing_too(checkpointing: bool) -> None:
    encoder = random_encoder().double().train()
    found = []
    for again in (False, checkpointing):
        encoder.zero_grad()
        encoder.transformer.checkpoint_activations = again
        (mean, state), _ = encoder.tap(batch(torch.float64)[0], None, [Tap((2, 3), "mean_map"), Tap((3,))])
        (mean[..., 0].square().sum() + state.square().mean()).backward()
        found.append({n: p.grad for n, p in encoder.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and any("k_proj" in name for name in found[0])
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


def test_transforms_share_the_convolutions_and_have_passes_of_their_own() -> None:
    encoder = random_encoder()
    source, samples_mask = batch(torch.float32)
    calls: list[str] = []
    encoder.feature_extractor.register_forward_hook(lambda *_: calls.append("conv"))
    encoder.transformer.layers[0].register_forward_hook(lambda *_: calls.append("layer 1"))

    def mask(x: Tensor, padding: Tensor | None) -> Tensor:
        assert padding is not None and padding.shape == x.shape[:2]
        return torch.cat([torch.zeros_like(x[:, :3]), x[:, 3:]], 1)

    taps = [Tap((2,)), Tap((0,), transform=mask), Tap((2,), transform=mask), Tap((0,))]
    found, _ = encoder.tap(source, samples_mask, taps)
    assert calls == ["conv", "layer 1", "layer 1"]
    whole, masked = encoder(source, samples_mask), encoder(source, samples_mask, transform=mask)
    assert torch.equal(found[0], whole.hidden_states[2]) and torch.equal(found[3], whole.hidden_states[0])
    assert torch.equal(found[2], masked.hidden_states[2])
    assert torch.equal(found[1], mask(found[3], torch.zeros(found[3].shape[:2])))
    assert (found[2] - found[0]).abs().max() > 0.01


def test_normalised_states() -> None:
    hidden = states(2, 2, 3, 5)
    raw, normal = collect([Tap((1, 2)), Tap((1, 2), normalize=True)], ((state, None) for state in hidden))
    expected = sum(
        (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() for h in hidden[1:]
    )
    torch.testing.assert_close(normal, expected / 2)
    torch.testing.assert_close(raw, (hidden[1] + hidden[2]) / 2)


@pytest.mark.parametrize(
    ("tap", "said"),
    [
        (Tap((4,)), ["layers: [4]", "states", "0 to 3"]),
        (Tap(()), ["layers: []"]),
        (Tap((0,), "maps"), ["layers: [0]", "maps", "1 to 3"]),
        (Tap((1, 2), "mean_map"), ["layers: [2]", "pruned"]),
        (Tap((1,), "map"), ["kind: 'map'", "mean_map"]),
    ],
)
def test_what_an_encoder_does_not_have(tap: Tap, said: list) -> None:
    config = random_encoder(**LARGE_STYLE, heads=[[0], [], [1]]).config
    with pytest.raises(ValueError, match=says(*said)):
        tap.check(config)
