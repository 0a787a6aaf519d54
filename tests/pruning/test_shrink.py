"""Shrinking keeps the function, at the requested size."""

from __future__ import annotations

import pytest
import torch
from messages import says

from skill_fairseq.modules.config import EncoderConfig, wavlm_base
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.pruning.expected import expected_parameters, full_parameters
from skill_fairseq.pruning.selection import apply_selection, select_units
from skill_fairseq.pruning.shrink import describe_units, shrink

BASE = {
    "conv_feature_layers": "[(16,10,5)] + [(16,3,2)] * 4 + [(16,2,2)] * 2",
    "encoder_layers": 4,
    "encoder_embed_dim": 32,
    "encoder_ffn_embed_dim": 48,
    "encoder_attention_heads": 4,
    "conv_pos": 16,
    "conv_pos_groups": 4,
    "relative_position": True,
    "num_buckets": 32,
    "max_distance": 40,
}
LARGE = {**BASE, "extractor_mode": "layer_norm", "layer_norm_first": True, "conv_bias": True}
HUBERT = {**BASE, "relative_position": False}
ALL = ("conv", "heads", "ffn", "attention_layers", "ffn_layers")
TWO_LAYERS = {**HUBERT, "feature_layer_norm": False}
THIN = {
    **BASE,
    "conv_feature_layers": "[(8,10,5), (16,1,1)] + [(16,3,2)] * 4 + [(32,1,1)] + [(32,2,2)] * 2",
    "feature_linear": False,
}
NOTHING = 1e-35  # oneDNN of torch 1.12 gives denormal numbers instead of gradients of 0


def gated_encoder(shape: dict, units: tuple = ALL, seed: int = 0, spread: float = 2.0) -> SpeechEncoder:
    """Random weights everywhere, gates scattered around their threshold, and all layer gates open except two."""
    torch.manual_seed(seed)
    encoder = SpeechEncoder(EncoderConfig(pruning_units=list(units), **shape))
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith("log_alpha"):
                parameter.copy_(torch.randn_like(parameter) * spread)
            elif parameter.dim() == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3 + ("norm.weight" in name))
            elif name != "transformer.pos_conv.weight_g":
                parameter.copy_(torch.randn_like(parameter) * 0.25)
    gates = dict(encoder.named_gates())
    for name, gate in gates.items():
        if name.endswith("output_gate"):
            gate.log_alpha.data.fill_(1.5)
    if "attention_layers" in units:
        gates["transformer.layers.1.attention.output_gate"].log_alpha.data.fill_(-8.0)
    if "ffn_layers" in units:
        gates["transformer.layers.2.ffn.output_gate"].log_alpha.data.fill_(-8.0)
    if "heads" in units:  # a sublayer that loses all units but is not removed
        gates["transformer.layers.3.attention.gate"].log_alpha.data.fill_(-8.0)
    if "ffn" in units:
        gates["transformer.layers.0.ffn.gate"].log_alpha.data.fill_(-8.0)
    return encoder.eval()


def assert_same_outputs(one: SpeechEncoder, other: SpeechEncoder, padded: bool = True) -> None:
    generator = torch.Generator().manual_seed(7)
    source = torch.randn(2, 4000, generator=generator)
    mask = torch.zeros(2, 4000, dtype=torch.bool)
    mask[1, 2500:] = True
    for padding in (None, mask) if padded else (None,):
        with torch.no_grad():
            a, b = one(source, padding), other(source, padding)
        for i, (x, y) in enumerate(zip([*a.hidden_states, a.x], [*b.hidden_states, b.x])):
            error = (x - y).norm() / x.norm()
            assert error < 1e-5, f"state {i}: relative error {error:.1e}"


@pytest.mark.parametrize(
    "shape", [BASE, LARGE, HUBERT, TWO_LAYERS, THIN], ids=["base", "large", "hubert", "no_norm", "no_linear"]
)
@pytest.mark.parametrize(
    "units",
    [("conv",), ("heads",), ("ffn",), ("attention_layers", "ffn_layers"), ALL],
    ids=["conv", "heads", "ffn", "layers", "all"],
)
def test_outputs_stay(shape: dict, units: tuple) -> None:
    gated = gated_encoder(shape, units)
    small = shrink(gated)
    assert small.num_parameters() < gated.num_parameters()
    assert not list(small.named_gates())
    assert_same_outputs(gated, small)


def test_removed_and_emptied_sublayers() -> None:
    small = shrink(gated_encoder(BASE))
    assert small.config.heads[1] is None and small.transformer.layers[1].attention is None
    assert small.config.ffn_dims[2] is None and small.transformer.layers[2].ffn is None
    assert small.config.heads[3] == [] and small.transformer.layers[3].attention.out_proj.bias.numel() == 32
    assert small.config.ffn_dims[0] == 0
    assert small.transformer.relative_position is not None


def test_first_layer_may_lose_its_attention_and_relative_position_stays() -> None:
    gated = gated_encoder(BASE, ("attention_layers",))
    gates = dict(gated.named_gates())
    gates["transformer.layers.0.attention.output_gate"].log_alpha.data.fill_(-9.0)
    small = shrink(gated)
    assert small.config.heads[0] is None
    assert torch.equal(small.transformer.relative_position.weight, gated.transformer.relative_position.weight)
    assert_same_outputs(gated, small)


def test_sampled_zeros_are_exact_too() -> None:
    """With gates at exactly 0 or 1 the training forward is the shrunk encoder's, norms included."""
    for shape in (BASE, LARGE):
        gated = gated_encoder(shape, ("conv", "heads", "ffn"))
        for _, gate in gated.named_gates():
            closed = gate.log_alpha < 0
            closed[0] = False
            gate.log_alpha.data.copy_(torch.where(closed, -60.0, 60.0))
        small = shrink(gated)
        gated.train()  # no dropout in it: only the gates sample
        assert_same_outputs(gated, small)


@pytest.mark.parametrize("shape", [BASE, LARGE], ids=["base", "large"])
def test_closed_units_get_no_gradient(shape: dict) -> None:
    gated = gated_encoder(shape, ("conv", "heads", "ffn")).train()
    for _, gate in gated.named_gates():
        closed = gate.log_alpha < 0
        closed[0] = False
        gate.log_alpha.data.copy_(torch.where(closed, -60.0, 60.0))
    gated(torch.randn(1, 3000)).x.square().sum().backward()
    for i, layer in enumerate(gated.feature_extractor.layers):
        closed = layer.gate.log_alpha < 0
        assert closed.any()
        assert layer.conv.weight.grad[closed].abs().max() < NOTHING
        if layer.norm is not None:
            assert layer.norm.weight.grad[closed].abs().max() < NOTHING
        assert (layer.gate.grad[closed] == 0).all()
        if i:
            before = gated.feature_extractor.layers[i - 1].gate.log_alpha < 0
            assert layer.conv.weight.grad[:, before].abs().max() < NOTHING
    last = gated.feature_extractor.layers[-1].gate.log_alpha < 0
    assert gated.feature_projection.linear.weight.grad[:, last].abs().max() < NOTHING
    assert gated.feature_projection.norm.bias.grad[last].abs().max() < NOTHING


def test_shrinks_again() -> None:
    once = shrink(gated_encoder(BASE, ("conv", "heads", "ffn"), spread=1.0))
    original = full_parameters(once.config)
    again = SpeechEncoder(once.config.replace(pruning_units=["conv", "heads", "ffn"])).eval()
    again.load_state_dict(once.state_dict(), strict=False)
    torch.manual_seed(3)
    for _, gate in again.named_gates():
        gate.log_alpha.data.copy_(torch.randn(gate.num_units) * 2 + 0.5)
    twice = shrink(again)
    assert twice.num_parameters() < once.num_parameters() < original == full_parameters(twice.config)
    assert_same_outputs(again, twice)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.62])
def test_global_correction_hits_the_size(sparsity: float) -> None:
    gated = gated_encoder(BASE, ("conv", "heads", "ffn"), spread=1.0)
    original = full_parameters(gated.config)
    selection = select_units(gated, sparsity)
    small = shrink(gated, sparsity)
    smallest_unit = 2 * BASE["encoder_embed_dim"] + 1  # of the FFN
    assert abs(small.num_parameters() - (1 - sparsity) * original) <= smallest_unit / 2 + 1
    apply_selection(gated, selection)
    assert_same_outputs(gated, small)
    kept = {name: gate.kept() for name, gate in gated.named_gates()}
    for name, gate in gated.named_gates():  # within a gate, always the most wanted units
        if kept[name].any() and not kept[name].all():
            assert gate.log_alpha[kept[name]].min() >= gate.log_alpha[~kept[name]].max()


def test_base_size_within_a_thousandth() -> None:
    torch.manual_seed(0)
    gated = SpeechEncoder(wavlm_base(pruning_units=["conv", "heads", "ffn"]))
    for name, gate in gated.named_gates():
        centre = -1.2 if "ffn" in name else -0.9
        gate.log_alpha.data.copy_(torch.randn(gate.num_units) * 2.0 + centre)
    small = shrink(gated, 0.75)
    target = 0.25 * 94_381_168
    assert abs(small.num_parameters() - target) / target < 1e-3
    assert small.config.original_parameters == 94_381_168


def test_counted_sizes_are_the_real_ones() -> None:
    for shape in (BASE, LARGE, HUBERT):
        gated = gated_encoder(shape)
        for encoder in (gated, shrink(gated)):
            real = sum(p.numel() for n, p in encoder.named_parameters() if not n.endswith("log_alpha"))
            assert encoder.num_parameters() == real
        ungated = SpeechEncoder(gated.config.replace(pruning_units=[]))
        assert expected_parameters(ungated) == ungated.num_parameters() == full_parameters(gated.config)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 0.999])
def test_unreachable_sparsity(sparsity: float) -> None:
    with pytest.raises(ValueError, match=says("sparsity", sparsity)):
        shrink(gated_encoder(BASE), sparsity)


def test_ungated_encoder_is_refused() -> None:
    with pytest.raises(ValueError, match=says("gates")):
        shrink(SpeechEncoder(EncoderConfig(**BASE)))


def test_what_is_left_in_words() -> None:
    assert [describe_units(left, 12) for left in (12, 3, 0, None)] == ["12 / 12", "3 / 12", "bias only", "removed"]


@pytest.mark.parametrize("shape", [BASE, LARGE], ids=["base", "large"])
def test_double_precision_stays(shape: dict) -> None:
    encoder = gated_encoder(shape).double()
    small = shrink(encoder)
    assert {p.dtype for p in small.parameters()} == {torch.float64}
    source = torch.randn(2, 4000, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(small(source).x, encoder(source).x, rtol=0, atol=1e-7)  # gates are float32
