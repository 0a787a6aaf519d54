"""Time reduction (FitHuBERT), reused attention maps and scaled gradients (ARMHuBERT) against their authors' code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from messages import says
from oracle import RELATED, agrees, near, tensor, tensors
from torch import Tensor

from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.size import count_macs, count_parameters, widths_of
from skill_fairseq.modules.taps import Tap
from skill_fairseq.modules.transformer import Dropouts, Transformer
from tests.conftest import random_encoder

NAMES = {
    "pos_conv.0.": "pos_conv.",
    "self_attn_layer_norm": "attention_norm",
    "self_attn": "attention",
    "final_layer_norm": "ffn_norm",
    "fc1": "ffn.fc1",
    "fc2": "ffn.fc2",
}
ARM = {"relative_position": False, "encoder_layers": 4, "reuse_attention": [2, 4]}


def transformer(case: dict[str, Any], **changes: Any) -> Transformer:
    """The Transformer of an oracle case, its weights in float64."""
    shape, weights = case["config"], tensors(case["weights"])
    config = EncoderConfig(
        encoder_layers=shape["layers"],
        encoder_embed_dim=shape["width"],
        encoder_ffn_embed_dim=shape["ffn"],
        encoder_attention_heads=shape["heads"],
        conv_pos=shape["conv_pos"],
        conv_pos_groups=shape["conv_pos_groups"],
        **changes,
    )
    module, state = Transformer(config, Dropouts()).double().eval(), {}
    for name, value in weights.items():
        if config.time_reduction > 1 and name.startswith("layers."):  # there the reduction is the first layer
            _, number, rest = name.split(".", 2)
            name = f"layers.{int(number) - 1}.{rest}" if int(number) else f"time_reduction.{rest}"
        for theirs, own in NAMES.items():
            name = name.replace(theirs, own)
        state[name] = value
    module.load_state_dict(state)
    return module


def test_time_reduction_is_that_of_fithubert() -> None:
    cases = RELATED["cases"]["fithubert"]
    module = transformer(cases["encoder"], time_reduction=2)
    x = tensor(cases["encoder"]["inputs"]["projected"])
    reduced: list[Tensor] = []
    module.time_reduction.register_forward_hook(lambda m, inputs, out: reduced.append(out.transpose(1, 2)))
    states = module(x)[1]
    assert agrees(reduced[0], cases["encoder"]["reduced"])
    assert all(agrees(state, wanted) for state, wanted in zip(states, cases["encoder"]["layers"]))
    assert states[0].shape == (2, 4, 8)  # the last of 9 frames is dropped
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, 6:] = True
    for state, wanted in zip(module(x, mask)[1], cases["encoder_padded"]["valid_frames_of_utterance_0"]):
        assert agrees(state[0, : wanted["shape"][0]], wanted)


def test_reused_maps_are_those_of_the_paper() -> None:
    case = RELATED["cases"]["armhubert"]["reuse"]
    module = transformer(case, reuse_attention=[2, 4])
    x = tensor(case["inputs"]["projected"])
    states = module(x)[1]
    assert all(agrees(state, wanted) for state, wanted in zip(states, case["paper"]))
    maps = [found for _, found in module.run(x, map_layers={1, 2})][:2]
    assert all(agrees(found.heads[0], case["map_of_layer_1_utterance_0"]) for found in maps)


def test_gradients_are_scaled_as_in_armhuberts_code() -> None:
    case = RELATED["cases"]["armhubert"]["gradient_scale"]
    for layers, key in ((4, "measured_own"), (12, "own_12")):
        encoder = random_encoder(encoder_layers=layers)
        source = torch.randn(1, 2000)
        norms = []
        for scaled in (False, True):
            encoder.transformer.layer_grad_scale = scaled
            for layer in range(1, layers + 1):
                encoder.zero_grad()
                encoder(source).hidden_states[layer].square().sum().backward()
                norms.append(encoder.transformer.layers[layer - 1].ffn_norm.weight.grad.norm().item())
        assert [b / a for a, b in zip(norms, norms[layers:])] == near(case[key], 1e-4)
    # And through the layers above: the part of the last layer's loss that reaches the one before.
    found = []
    for scaled in (False, True):
        encoder.transformer.layer_grad_scale = scaled
        encoder.zero_grad()
        encoder(source).hidden_states[12].square().sum().backward()
        found.append(encoder.transformer.layers[10].ffn_norm.weight.grad.norm().item())
    assert found[1] / found[0] == near(case["own_12"][11] * case["through_12"][10], 1e-4)


@pytest.mark.parametrize(
    "changes",
    [{"time_reduction": 2}, {"reuse_attention": [2, 3]}, {"reuse_attention": [3], "relative_position": False}],
)
def test_size_and_work_are_those_of_the_modules(changes: dict[str, Any]) -> None:
    encoder = random_encoder(**changes)
    assert count_parameters(encoder.config, widths_of(encoder.config)) == encoder.num_parameters()
    expected = count_parameters(encoder.config, {k: torch.tensor(v) for k, v in widths_of(encoder.config).items()})
    assert int(expected) == encoder.num_parameters()


def test_work_of_a_reduced_and_of_a_reusing_encoder_by_hand() -> None:
    plain = EncoderConfig(**{**random_encoder().config.to_dict(), "relative_position": False})
    work = [
        count_macs(config, widths_of(config), 16000)
        for config in (plain, plain.replace(reuse_attention=[2]), plain.replace(time_reduction=2))
    ]
    dim, frames = 32, int(plain.num_frames(16000))
    assert work[0] - work[1] == 2 * frames * dim * dim + frames**2 * dim
    half = frames // 2
    layers = [3 * (4 * t * dim * dim + 2 * t * t * dim + 2 * t * dim * 48) for t in (frames, half)]
    assert work[2] - work[0] == layers[1] - layers[0] + half * dim * dim * 2


def test_a_reduced_encoder_has_one_rate_for_all_states() -> None:
    encoder = random_encoder(time_reduction=2)
    config = encoder.config
    assert (config.feature_downsampling, config.downsampling, config.receptive_field) == (320, 640, 720)
    source, mask = torch.randn(2, 6000), torch.zeros(2, 6000, dtype=torch.bool)
    mask[1, 3000:] = True
    out = encoder(source, mask)
    frames = config.num_output_frames(6000)
    assert frames == config.num_frames(6000) // 2
    assert {state.size(1) for state in [*out.hidden_states, out.x]} == {frames} == {out.padding_mask.size(1)}
    states, padding = encoder.tap(source, mask, [Tap((0, 2)), Tap((0,))])
    assert torch.equal(states[0], (out.hidden_states[0] + out.hidden_states[2]) / 2)
    assert torch.equal(padding, out.padding_mask)
    with pytest.raises(ValueError, match=says("719 samples", "at least 720")):
        encoder(source[:, :719])


def test_maps_are_never_dropped_where_others_take_them(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = SpeechEncoder(random_encoder(**ARM).config, Dropouts(layerdrop=0.999)).train()
    ran: list[int] = []
    for i, layer in enumerate(encoder.transformer.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i + 1))
    encoder(torch.randn(1, 2000))
    assert {1, 3} <= set(ran)


def test_recomputed_layers_give_the_same_gradients() -> None:
    encoder = random_encoder(**ARM).train()
    source = torch.randn(2, 3000)
    found = []
    for again in (False, True):
        encoder.transformer.checkpoint_activations = again
        encoder.zero_grad()
        encoder(source).x.square().sum().backward()
        found.append([p.grad.clone() for p in encoder.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"reuse_attention": [1]}, ("reuse_attention: [1]", "from 2 to 3")),
        ({"reuse_attention": [3, 2]}, ("reuse_attention", "ascending")),
        ({"reuse_attention": [2], "heads": [[0], [1], [2]]}, ("heads", "1 and 2", "share a map")),
        ({"reuse_attention": [2], "pruning_units": ["heads"]}, ("pruning_units", "reuse_attention")),
        ({"reuse_attention": [2], "unit_widths": {"rank": 4}}, ("unit_widths", "reuse_attention")),
        ({"time_reduction": 0}, ("time_reduction: 0", "positive")),
    ],
)
def test_unusable_fields_are_named(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=says(*words)):
        random_encoder(**changes)


def test_defaults_are_not_written() -> None:
    assert not {"time_reduction", "reuse_attention"} & set(random_encoder().config.to_dict())
    config = random_encoder(time_reduction=2, reuse_attention=[2]).config
    assert EncoderConfig.from_dict(config.to_dict()) == config
