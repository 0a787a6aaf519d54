"""DPHuBERT's published students give the same results here.

Their layout and arithmetic are reimplemented below after github.com/pyf98/DPHuBERT (wav2vec2/components.py), whose
package is not on PyPI: TorchAudio's, with one number per layer, and LayerNorm over the remaining channels.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from messages import says

from skill_fairseq import shrink
from skill_fairseq.checkpoints import load_encoder, save_encoder
from skill_fairseq.checkpoints.load import read_source

CONV = [(13, 10, 5), (11, 3, 2), (16, 3, 2), (9, 3, 2), (12, 3, 2), (10, 2, 2), (7, 2, 2)]
DIM, HEADS, LAYERS, BUCKETS = 48, 4, 4, 16
FFN = [30, 17, 5, 24]

COMMON = {
    "extractor_mode": "group_norm",
    "extractor_conv_layer_config": CONV,
    "extractor_conv_bias": False,
    "encoder_embed_dim": DIM,
    "encoder_projection_dropout": 0.1,
    "encoder_pos_conv_kernel": 16,
    "encoder_pos_conv_groups": 4,
    "encoder_num_layers": LAYERS,
    "encoder_use_attention": [True, True, False, True],
    "encoder_use_feed_forward": [True, False, True, True],
    "encoder_attention_dropout": 0.1,
    "encoder_ff_interm_features": FFN,
    "encoder_ff_interm_dropout": 0.0,
    "encoder_dropout": 0.1,
    "encoder_layer_norm_first": False,
    "encoder_layer_drop": 0.05,
    "aux_num_out": None,
    "normalize_waveform": False,
    "extractor_prune_conv_channels": False,
    "encoder_prune_attention_heads": False,
    "encoder_prune_attention_layer": False,
    "encoder_prune_feed_forward_intermediate": False,
    "encoder_prune_feed_forward_layer": False,
}
HUBERT = {**COMMON, "encoder_num_heads": [3, 1, 0, 4], "encoder_head_dim": DIM // HEADS}
WAVLM = {
    **COMMON,
    "encoder_total_num_heads": [HEADS] * LAYERS,
    "encoder_remaining_heads": [[0, 2, 3], [1], [], [0, 1, 2, 3]],
    "encoder_num_buckets": BUCKETS,
    "encoder_max_distance": 24,
}
LARGE = {"extractor_mode": "layer_norm", "extractor_conv_bias": True, "encoder_layer_norm_first": True}
LARGE["normalize_waveform"] = True
WITHOUT_POSITIONS = {"encoder_use_attention": [False, True, False, True]}
CASES = {
    "HuBERT": HUBERT,
    "WavLM": WAVLM,
    "HuBERT Large": {**HUBERT, **LARGE},
    "WavLM Large": {**WAVLM, **LARGE},
    "WavLM without layer 0's attention": {**WAVLM, **WITHOUT_POSITIONS},
}


def heads_of(config, layer):
    left = config.get("encoder_remaining_heads") or [list(range(n)) for n in config["encoder_num_heads"]]
    return left[layer]


def random_state(config):
    """Weights with DPHuBERT's names; no scale is 1, no bias 0."""
    generator = torch.Generator().manual_seed(0)
    state = {}

    def add(name, *shape, scale=None):
        noise = torch.randn(shape, generator=generator)
        fan_in = math.prod(shape[1:]) or 1
        state[name] = scale + 0.2 * noise if scale is not None else noise / fan_in**0.5

    def linear(name, rows, columns):
        add(f"{name}.weight", rows, columns)
        add(f"{name}.bias", rows, scale=0)

    def norm(name, width):
        add(f"{name}.weight", width, scale=1)
        add(f"{name}.bias", width, scale=0)

    channels = 1
    for i, (out, kernel, _) in enumerate(config["extractor_conv_layer_config"]):
        prefix = f"feature_extractor.conv_layers.{i}"
        add(f"{prefix}.conv.weight", out, channels, kernel)
        if config["extractor_conv_bias"]:
            add(f"{prefix}.conv.bias", out, scale=0)
        if i == 0 or config["extractor_mode"] == "layer_norm":
            norm(f"{prefix}.layer_norm", out)
        channels = out
    add("feature_extractor.dummy_weight", channels, scale=0.8)
    norm("encoder.feature_projection.layer_norm", channels)
    linear("encoder.feature_projection.projection", DIM, channels)
    groups, kernel = config["encoder_pos_conv_groups"], config["encoder_pos_conv_kernel"]
    add("encoder.transformer.pos_conv_embed.conv.weight_g", 1, 1, kernel, scale=1)
    add("encoder.transformer.pos_conv_embed.conv.weight_v", DIM, DIM // groups, kernel)
    add("encoder.transformer.pos_conv_embed.conv.bias", DIM, scale=0)
    norm("encoder.transformer.layer_norm", DIM)
    for i in range(LAYERS):
        prefix = f"encoder.transformer.layers.{i}"
        if config["encoder_use_attention"][i]:
            width = len(heads_of(config, i)) * DIM // HEADS
            for part in "qkv":
                linear(f"{prefix}.attention.{part}_proj", width, DIM)
            linear(f"{prefix}.attention.out_proj", DIM, width)
            if "encoder_remaining_heads" in config:
                linear(f"{prefix}.attention.gru_rel_pos_linear", 8, DIM // HEADS)
                add(f"{prefix}.attention.gru_rel_pos_const", 1, HEADS, 1, 1, scale=1)
                if i == 0:
                    add(f"{prefix}.attention.rel_attn_embed.weight", BUCKETS, HEADS, scale=0)
                    state[f"{prefix}.attention.rel_attn_embed.weight"] *= 5
        if config["encoder_use_feed_forward"][i]:
            linear(f"{prefix}.feed_forward.intermediate_dense", FFN[i], DIM)
            linear(f"{prefix}.feed_forward.output_dense", DIM, FFN[i])
        norm(f"{prefix}.layer_norm", DIM)
        norm(f"{prefix}.final_layer_norm", DIM)
    return state


def position_bias(state, frames, max_distance):
    """(H, T, T), or None if layer 0 has no attention."""
    table = state.get("encoder.transformer.layers.0.attention.rel_attn_embed.weight")
    if table is None:
        return None
    half, exact = BUCKETS // 2, BUCKETS // 4
    bias = torch.empty(HEADS, frames, frames)
    for i in range(frames):
        for j in range(frames):
            distance = abs(j - i)
            if distance >= exact:
                far = torch.log(torch.tensor(float(distance)) / exact) / math.log(max_distance / exact)
                distance = min(half - 1, exact + int(far * (half - exact)))
            bias[:, i, j] = table[distance + half * (j > i)]
    return bias


def reference(state, config, source, lengths=None):
    """DPHuBERT's forward: L + 1 hidden states (B, T, D), the output, and the frames' padding mask or None."""

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    x = source[:, None]
    for i, (out, kernel, stride) in enumerate(config["extractor_conv_layer_config"]):
        prefix = f"feature_extractor.conv_layers.{i}"
        x = F.conv1d(x, state[f"{prefix}.conv.weight"], state.get(f"{prefix}.conv.bias"), stride)
        if config["extractor_mode"] == "layer_norm":
            x = norm(x.transpose(1, 2), f"{prefix}.layer_norm").transpose(1, 2)
        elif i == 0:
            x = F.group_norm(x, out, state[f"{prefix}.layer_norm.weight"], state[f"{prefix}.layer_norm.bias"])
        x = F.gelu(x)
        if lengths is not None:
            lengths = torch.div(lengths - kernel, stride, rounding_mode="floor") + 1
    x = x.transpose(1, 2) * state["feature_extractor.dummy_weight"]
    x = linear(norm(x, "encoder.feature_projection.layer_norm"), "encoder.feature_projection.projection")
    padding, hidden_keys = None, 0.0
    if lengths is not None:
        padding = torch.arange(x.size(1)) >= lengths[:, None]
        x = x.masked_fill(padding[..., None], 0)
        hidden_keys = -10000.0 * padding[:, None, None]
    states = [x]

    name = "encoder.transformer.pos_conv_embed.conv"
    weight = torch._weight_norm(state[f"{name}.weight_v"], state[f"{name}.weight_g"], 2)
    kernel, groups = config["encoder_pos_conv_kernel"], config["encoder_pos_conv_groups"]
    y = F.conv1d(x.transpose(1, 2), weight, state[f"{name}.bias"], padding=kernel // 2, groups=groups)
    x = x + F.gelu(y[..., : x.size(1)]).transpose(1, 2)
    first = config["encoder_layer_norm_first"]
    x = x if first else norm(x, "encoder.transformer.layer_norm")
    bias = position_bias(state, x.size(1), config.get("encoder_max_distance"))
    for i in range(LAYERS):
        prefix = f"encoder.transformer.layers.{i}"
        if config["encoder_use_attention"][i]:
            y = norm(x, f"{prefix}.layer_norm") if first else x
            x = x + attention(y, state, f"{prefix}.attention", heads_of(config, i), bias, hidden_keys, linear)
        x = x if first else norm(x, f"{prefix}.layer_norm")
        if config["encoder_use_feed_forward"][i]:
            y = norm(x, f"{prefix}.final_layer_norm") if first else x
            y = F.gelu(linear(y, f"{prefix}.feed_forward.intermediate_dense"))
            x = x + linear(y, f"{prefix}.feed_forward.output_dense")
        x = x if first else norm(x, f"{prefix}.final_layer_norm")
        states.append(x)
    return states, norm(x, "encoder.transformer.layer_norm") if first else x, padding


def attention(x, state, name, heads, bias, hidden_keys, linear):
    shape = (*x.shape[:2], len(heads), DIM // HEADS)
    q, k, v = (linear(x, f"{name}.{part}_proj").view(shape).transpose(1, 2) for part in "qkv")
    scores = q @ k.transpose(2, 3) / math.sqrt(DIM // HEADS) + hidden_keys
    if bias is not None:
        gates = linear(x.unflatten(-1, (HEADS, -1)), f"{name}.gru_rel_pos_linear").unflatten(-1, (2, 4)).sum(-1)
        a, b = gates.sigmoid().permute(3, 0, 2, 1)[..., None]  # (B, H, T, 1) each
        factor = a * (b * state[f"{name}.gru_rel_pos_const"] - 1.0) + 2.0
        scores = scores + (factor * bias)[:, heads]
    y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return linear(y, f"{name}.out_proj")


def save(config, path, **changes):
    state = {**random_state(config), **changes.pop("state", {})}
    torch.save({"state_dict": state, "config": config, "distill_linear_projs": {}, **changes}, path)
    return state


@pytest.mark.parametrize("case", CASES)
@pytest.mark.formats("in", "DPHuBERT student", "a reference written after DPHuBERT's code")
def test_same_hidden_states_alone_and_padded(foreign, case, tmp_path):
    config = CASES[case]
    state = save(config, tmp_path / "student.pth")
    encoder = load_encoder(tmp_path / "student.pth")
    assert encoder.normalize is config["normalize_waveform"]
    source, padding = foreign.padded_batch()
    for row, samples in zip(source, foreign.SAMPLES):
        alone = row[None, :samples]
        with torch.no_grad():
            foreign.assert_same_states(encoder(alone), foreign.States(*reference(state, config, alone)))
    with torch.no_grad():
        theirs = foreign.States(*reference(state, config, source, (~padding).sum(1)))
        foreign.assert_same_states(encoder(source, padding), theirs)


def test_size_and_format(tmp_path):
    state = save(WAVLM, tmp_path / "student.pth")
    source = read_source(tmp_path / "student.pth")
    assert source.format == "DPHuBERT's model"
    assert source.config.heads == [[0, 2, 3], [1], None, [0, 1, 2, 3]]
    assert source.config.ffn_dims == [30, None, 5, 24]
    parameters = sum(tensor.numel() for name, tensor in state.items() if name != "feature_extractor.dummy_weight")
    assert load_encoder(tmp_path / "student.pth").num_parameters() == parameters


def test_exports_and_can_be_pruned_further(foreign, tmp_path):
    save(WAVLM, tmp_path / "student.pth")
    encoder = load_encoder(tmp_path / "student.pth")
    save_encoder(encoder, tmp_path / "student.safetensors")
    again = load_encoder(tmp_path / "student.safetensors")
    source, padding = foreign.padded_batch()
    with torch.no_grad():
        assert torch.equal(again(source, padding).x, encoder(source, padding).x)
    gated = type(encoder)(encoder.config.replace(pruning_units=["conv", "heads", "ffn"]))
    gated.load_state_dict(encoder.state_dict(), strict=False)
    torch.manual_seed(0)
    with torch.no_grad():
        for _, gate in gated.named_gates():
            gate.log_alpha.uniform_(-3, 3)
        small = shrink(gated.eval())
        assert small.num_parameters() < encoder.num_parameters()
        assert (small(source, padding).x - gated(source, padding).x).abs().max() < 1e-5


def test_is_a_teacher_and_a_student(foreign, small, speech, tmp_path):
    save(WAVLM, tmp_path / "student.pth")
    foreign.assert_teaches_and_learns(small, speech, tmp_path / "student.pth", tmp_path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({**WAVLM, "encoder_prune_attention_heads": True}, "encoder_prune_attention_heads = True"),
        ({**WAVLM, "encoder_ff_interm_features": FFN[:3]}, "3 entries"),
        ({**WAVLM, "encoder_total_num_heads": [4, 4, 4, 2]}, "encoder_total_num_heads"),
        ({**HUBERT, "encoder_num_heads": [3, 2, 0, 4]}, "encoder.transformer.layers.1.attention.q_proj.weight"),
    ],
)
def test_configs_that_do_not_fit(config, said, tmp_path):
    weights = random_state(HUBERT if "encoder_num_heads" in config else WAVLM)
    torch.save({"state_dict": weights, "config": config}, tmp_path / "student.pth")
    with pytest.raises(ValueError, match=says("student.pth", said)):
        load_encoder(tmp_path / "student.pth")


def test_left_over_weights_are_listed(tmp_path):
    gate = {"encoder.transformer.layers.0.attention.hard_concrete_for_heads.log_alpha": torch.ones(4)}
    save(HUBERT, tmp_path / "student.pth", state=gate)
    with pytest.raises(ValueError, match=says("DPHuBERT", "1 left over", *gate)):
        load_encoder(tmp_path / "student.pth")
