"""The encoder computes what TorchAudio's models compute, from state dicts with and without a config.

TorchAudio's code is loaded from its folder, because its package cannot be imported with a CPU torch.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import sys
import types

import pytest
import torch
from messages import says

from skill_fairseq.checkpoints import load_encoder
from skill_fairseq.checkpoints.load import read_source
from skill_fairseq.cli.info import main as skill_info


@pytest.fixture(scope="module")
def torchaudio():
    """The module torchaudio.models.wav2vec2.model."""
    folder = importlib.metadata.distribution("torchaudio").locate_file("torchaudio/models/wav2vec2")
    package = types.ModuleType("wav2vec2_of_torchaudio")
    package.__path__ = [str(folder)]
    sys.modules[package.__name__] = package
    return importlib.import_module("wav2vec2_of_torchaudio.model")


def shape_of(foreign, style, dim, heads, **changes):
    """Keyword arguments of torchaudio.models.wav2vec2_model, small except for the width."""
    large = style == "large"
    return {
        "extractor_mode": "layer_norm" if large else "group_norm",
        "extractor_conv_layer_config": foreign.CONV[style],
        "extractor_conv_bias": large,
        "encoder_embed_dim": dim,
        "encoder_projection_dropout": 0.1,
        "encoder_pos_conv_kernel": foreign.SHAPE[style]["conv_pos"],
        "encoder_pos_conv_groups": foreign.SHAPE[style]["groups"],
        "encoder_num_layers": 2,
        "encoder_num_heads": heads,
        "encoder_attention_dropout": 0.1,
        "encoder_ff_interm_features": 40,
        "encoder_ff_interm_dropout": 0.1,
        "encoder_dropout": 0.1,
        "encoder_layer_norm_first": large,
        "encoder_layer_drop": 0.1,
        **changes,
    }


def states(foreign, model, source, padding=None):
    """What TorchAudio computes."""
    lengths = None if padding is None else (~padding).sum(1)
    with foreign.Recorder(model.encoder.feature_projection) as first, torch.no_grad():
        layers, lengths = model.extract_features(source, lengths)
        x = layers[-1]
        if not model.encoder.transformer.layer_norm_first:  # theirs, with the opposite meaning
            x = model.encoder.transformer.layer_norm(x)
    if lengths is not None:
        padding = torch.arange(x.size(1)) >= lengths[:, None]
    return foreign.States([*first, *layers], x, padding)


def compare(foreign, encoder, model, padded=True):
    source, padding = foreign.padded_batch()
    with torch.no_grad():
        for row, samples in zip(source, foreign.SAMPLES):
            alone = row[None, :samples]
            foreign.assert_same_states(encoder(alone), states(foreign, model, alone))
        if padded:
            foreign.assert_same_states(encoder(source, padding), states(foreign, model, source, padding))


@pytest.mark.parametrize(("style", "dim", "heads"), [("base", 768, 12), ("large", 1024, 16), ("large", 1280, 16)])
@pytest.mark.formats("in", "TorchAudio state dict of wav2vec 2.0 or HuBERT", "TorchAudio's code")
def test_a_bare_state_dict(foreign, torchaudio, style, dim, heads, tmp_path):
    model = torchaudio.wav2vec2_model(**shape_of(foreign, style, dim, heads), aux_num_out=7)
    torch.save(foreign.randomise(model).state_dict(), tmp_path / "model.pth")
    encoder = load_encoder(tmp_path / "model.pth")
    assert encoder.normalize is (style == "large") and encoder.config.encoder_attention_heads == heads
    compare(foreign, encoder, model)


@pytest.mark.formats("in", "TorchAudio state dict of HuBERTPretrainModel", "TorchAudio's code")
def test_a_model_in_pretraining(foreign, torchaudio, tmp_path):
    masking = dict.fromkeys(("mask_prob", "mask_channel_prob"), 0.5)
    masking.update(dict.fromkeys(("mask_selection", "mask_channel_selection"), "static"))
    masking.update(dict.fromkeys(("mask_length", "mask_channel_length", "mask_min_space", "mask_channel_min_space"), 1))
    masking.update(dict.fromkeys(("no_mask_overlap", "no_mask_channel_overlap", "skip_masked", "skip_nomask"), False))
    masking.update(mask_other=0.0, mask_channel_other=0.0, num_classes=5, final_dim=8, feature_grad_mult=0.1)
    if "feature_grad_mult" not in inspect.signature(torchaudio.hubert_pretrain_model).parameters:
        del masking["feature_grad_mult"]  # older TorchAudio
    model = torchaudio.hubert_pretrain_model(**shape_of(foreign, "base", 768, 12), **masking)
    torch.save(foreign.randomise(model).state_dict(), tmp_path / "model.pth")
    compare(foreign, load_encoder(tmp_path / "model.pth"), model.wav2vec2)


def test_what_the_tensors_leave_open_is_said_to_be_assumed(foreign, torchaudio, tmp_path, caplog, capsys):
    shape = shape_of(foreign, "base", 768, 12)
    model = torchaudio.wav2vec2_model(**shape, aux_num_out=None)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    torch.save({"state_dict": model.state_dict(), "config": {**shape, "normalize_waveform": False}}, tmp_path / "a.pth")
    load_encoder(tmp_path / "bare.pth")
    for said in ("12 attention heads", "from the width 768", "strides 5,2,2,2,2,2,2", "LayerNorm after"):
        assert any(said in message and "assumed" in message for message in caplog.messages), said
    assert skill_info([str(tmp_path / "bare.pth")]) == 0
    assert "assumed       12 attention heads, from the width 768" in capsys.readouterr().out
    caplog.clear()
    load_encoder(tmp_path / "a.pth")
    assert not caplog.messages


@pytest.mark.parametrize("style", ["base", "large"])
def test_a_config_beside_it_settles_what_the_tensors_leave_open(foreign, torchaudio, style, tmp_path):
    conv = [(16, 8, 4), (16, 4, 3), (16, 3, 2), (16, 2, 1)]
    shape = shape_of(foreign, style, 48, 4, extractor_conv_layer_config=conv, encoder_layer_norm_first=style == "base")
    model = foreign.randomise(torchaudio.wav2vec2_model(**shape, aux_num_out=None))
    for config in (
        shape,
        {
            name: shape[name]
            for name in ("extractor_conv_layer_config", "encoder_num_heads", "encoder_layer_norm_first")
        },
    ):
        torch.save({"state_dict": model.state_dict(), "config": config}, tmp_path / "model.pth")
        compare(foreign, load_encoder(tmp_path / "model.pth"), model)
    for missing, said in (
        ("encoder_num_heads", ["width 48", "heads", "'config'"]),
        ("extractor_conv_layer_config", ["(8, 4, 3, 2)", "strides", "'config'"]),
    ):
        left = {name: value for name, value in shape.items() if name != missing}
        torch.save({"state_dict": model.state_dict(), "config": left}, tmp_path / "model.pth")
        with pytest.raises(ValueError, match=says("model.pth", *said)):
            load_encoder(tmp_path / "model.pth")


def wavlm_state_dict(model):
    """transformers' WavLM in TorchAudio's layout: one matrix for query, key and value, other module names."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name == "masked_spec_embed":
            continue
        if name.startswith(("feature_projection", "encoder.")):
            name = (
                name.replace("encoder.", "encoder.transformer.") if name.startswith("encoder.") else f"encoder.{name}"
            )
        if "k_proj" in name or "v_proj" in name:
            continue
        if "q_proj" in name:
            other = [
                name.replace("q_proj", part).replace("encoder.transformer.", "encoder.")
                for part in ("k_proj", "v_proj")
            ]
            tensor = torch.cat([tensor, *(model.state_dict()[key] for key in other)])
            name = name.replace("q_proj.", "attention.in_proj_")
        state[name.replace("attention.out_proj", "attention.attention.out_proj")] = tensor
    return state


@pytest.mark.parametrize("style", ["base", "large"])
@pytest.mark.formats("in", "TorchAudio state dict of WavLM", "transformers, TorchAudio's code")
def test_wavlm(foreign, torchaudio, style, tmp_path):
    model = foreign.huggingface("wavlm", style, max_bucket_distance=800)
    state = wavlm_state_dict(model)
    assert "encoder.transformer.layers.1.attention.attention.in_proj_weight" in state
    torch.save(state, tmp_path / "model.pth")
    encoder = load_encoder(tmp_path / "model.pth")
    assert encoder.config.relative_position and encoder.config.max_distance == 800
    source, padding = foreign.padded_batch()
    with torch.no_grad():
        foreign.assert_same_states(encoder(source, padding), foreign.huggingface_states(model, source, padding))
    if int(importlib.metadata.version("torchaudio").partition(".")[0]) >= 2:  # older ones have no WavLM
        heads, layers, ffn = (foreign.SHAPE[style][name] for name in ("heads", "layers", "ffn"))
        shape = shape_of(foreign, style, foreign.SHAPE[style]["dim"], heads, encoder_num_layers=layers)
        shape.update(encoder_ff_interm_features=ffn, encoder_num_buckets=16, encoder_max_distance=800, aux_num_out=None)
        theirs = torchaudio.wavlm_model(**shape).eval()
        theirs.load_state_dict({theirs_name(name, theirs): tensor for name, tensor in state.items()})
        compare(foreign, encoder, theirs, padded=False)  # theirs takes no lengths


def theirs_name(name, model):
    """The weight norm's names in this TorchAudio."""
    new = any("original0" in key for key in model.state_dict())
    for old, other in (
        ("weight_g", "parametrizations.weight.original0"),
        ("weight_v", "parametrizations.weight.original1"),
    ):
        name = name.replace(old, other) if new else name.replace(other, old)
    return name


def test_weights_are_accounted_for(foreign, torchaudio, tmp_path):
    model = torchaudio.wav2vec2_model(**shape_of(foreign, "base", 768, 12), aux_num_out=None)
    state = model.state_dict()
    state["encoder.transformer.adapter.weight"] = torch.ones(2)
    del state["encoder.transformer.layers.1.feed_forward.output_dense.bias"]
    torch.save(state, tmp_path / "model.pth")
    missing = ("1 missing", "encoder.transformer.layers.1.feed_forward.output_dense.bias")
    left_over = ("1 left over", "encoder.transformer.adapter.weight")
    with pytest.raises(ValueError, match=says("model.pth", "TorchAudio", *missing, *left_over)):
        load_encoder(tmp_path / "model.pth")
    several = {f"{name}.{key}": tensor for name in ("student", "teacher") for key, tensor in model.state_dict().items()}
    torch.save({"state_dict": several}, tmp_path / "several.pth")
    with pytest.raises(ValueError, match=says("several", "['student.', 'teacher.']")):
        read_source(tmp_path / "several.pth")
