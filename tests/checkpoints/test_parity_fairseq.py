"""The encoder computes what fairseq's HuBERT and wav2vec 2.0 and Microsoft's WavLM compute."""

from __future__ import annotations

import argparse
import re

import pytest
import torch

from skill_fairseq.checkpoints import load_encoder


@pytest.mark.parametrize("style", ["base", "large"])
@pytest.mark.parametrize("kind", ["hubert", "wav2vec2"])
def test_same_hidden_states_alone_and_padded(foreign, kind, style, tmp_path):
    model, cfg = foreign.fairseq(kind, style)
    encoder = load_encoder(foreign.save_fairseq(model, cfg, tmp_path / "model.pt"))
    assert encoder.normalize is (style == "large")
    source, padding = foreign.padded_batch()
    with torch.no_grad():
        for row, samples in zip(source, foreign.SAMPLES):
            alone = row[None, :samples]
            for mask in (None, torch.zeros_like(alone, dtype=torch.bool)):
                foreign.assert_same_states(encoder(alone, mask), foreign.fairseq_states(model, alone, mask))
        theirs = foreign.fairseq_states(model, source, padding)
        ours = encoder(source, padding)
        foreign.assert_same_states(ours, theirs)
        assert (encoder(source).x - ours.x)[~theirs.padding].abs().max() > 1e-2
        # The two models of fairseq count padded frames by different rules, and the batch tells them apart.
        other = {"chunks": "convolution", "convolution": "chunks"}[encoder.config.padding_rule]
        encoder.config = encoder.config.replace(padding_rule=other)
        assert not torch.equal(encoder(source, padding).padding_mask, theirs.padding)


@pytest.mark.parametrize("kind", ["hubert", "wav2vec2"])
def test_without_projection_where_conv_width_is_model_width(foreign, kind, tmp_path):
    conv = str(foreign.CONV["base"][:-1] + [(48, 2, 2)])
    model, cfg = foreign.fairseq(kind, "base", conv_feature_layers=conv, activation_fn="relu")
    assert model.post_extract_proj is None
    encoder = load_encoder(foreign.save_fairseq(model, cfg, tmp_path / "model.pt"))
    source, padding = foreign.padded_batch()
    with torch.no_grad():
        foreign.assert_same_states(encoder(source, padding), foreign.fairseq_states(model, source, padding))


@pytest.mark.parametrize("kind", ["hubert", "wav2vec2"])
def test_configs_of_every_age_and_type(foreign, kind, tmp_path):
    from omegaconf import OmegaConf

    model, cfg = foreign.fairseq(kind, "large")
    expected = load_encoder(foreign.save_fairseq(model, cfg, tmp_path / "model.pt"))
    name = cfg["model"].pop("_name")
    args = argparse.Namespace(arch=name, normalize=True, **cfg["model"])
    newer = {"model": {"_name": name, **cfg["model"]}, "task": cfg["task"]}
    for i, (written, changes) in enumerate(
        (
            (None, {"args": args}),
            ({"model": args, "task": argparse.Namespace(normalize=True)}, {}),
            (OmegaConf.create(newer), {}),
            ({**newer, "model": {**newer["model"], "normalize": "${task.normalize}"}}, {}),
        )
    ):
        found = load_encoder(foreign.save_fairseq(model, written, tmp_path / f"{i}.pt", **changes))
        assert found.config == expected.config and found.normalize
        state = found.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())


def test_half_precision_checkpoints_become_float32(foreign, tmp_path):
    model, cfg = foreign.fairseq("hubert", "base")
    encoder = load_encoder(foreign.save_fairseq(model.half(), cfg, tmp_path / "model.pt"))
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    expected = model.encoder.layers[1].fc1.weight.float()
    assert torch.equal(encoder.transformer.layers[1].ffn.fc1.weight, expected)


def microsoft_name(name: str, style: str) -> str:
    """From transformers' names of WavLM to Microsoft's, written after the keys of WavLM-Base+.pt."""
    norm = r"2.1" if style == "large" else "2"
    for pattern, replacement in (
        (r"^feature_extractor\.conv_layers\.(\d)\.conv\.", r"feature_extractor.conv_layers.\1.0."),
        (r"^(feature_extractor\.conv_layers\.\d)\.layer_norm\.", rf"\1.{norm}."),
        (r"^feature_projection\.layer_norm\.", "layer_norm."),
        (r"^feature_projection\.projection\.", "post_extract_proj."),
        (r"pos_conv_embed\.conv\.parametrizations\.weight\.original0", "pos_conv.0.weight_g"),
        (r"pos_conv_embed\.conv\.parametrizations\.weight\.original1", "pos_conv.0.weight_v"),
        (r"pos_conv_embed\.conv\.", "pos_conv.0."),
        (r"(layers\.\d+)\.layer_norm\.", r"\1.self_attn_layer_norm."),
        (r"attention\.rel_attn_embed", "self_attn.relative_attention_bias"),
        (r"attention\.gru_rel_pos_const", "self_attn.grep_a"),
        (r"attention\.gru_rel_pos_linear", "self_attn.grep_linear"),
        (r"\.attention\.", ".self_attn."),
        (r"feed_forward\.intermediate_dense", "fc1"),
        (r"feed_forward\.output_dense", "fc2"),
        (r"masked_spec_embed", "mask_emb"),
    ):
        name = re.sub(pattern, replacement, name)
    return name


@pytest.mark.parametrize("style", ["base", "large"])
def test_microsoft_wavlm(foreign, style, tmp_path):
    model, shape, large = foreign.huggingface("wavlm", style), foreign.SHAPE[style], style == "large"
    state = {microsoft_name(name, style): tensor for name, tensor in model.state_dict().items()}
    assert "encoder.layers.0.self_attn.relative_attention_bias.weight" in state
    assert "encoder.layers.2.self_attn.grep_linear.weight" in state and "mask_emb" in state
    cfg = {
        "extractor_mode": "layer_norm" if large else "default",
        "encoder_layers": shape["layers"],
        "encoder_embed_dim": shape["dim"],
        "encoder_ffn_embed_dim": shape["ffn"],
        "encoder_attention_heads": shape["heads"],
        "activation_fn": "gelu",
        "layer_norm_first": large,
        "conv_feature_layers": " + ".join(f"[{triple}]" for triple in foreign.CONV[style]),
        "conv_bias": large,
        "normalize": large,
        "conv_pos": shape["conv_pos"],
        "conv_pos_groups": shape["groups"],
        "relative_position_embedding": True,
        "num_buckets": 16,
        "max_distance": 24,
        "gru_rel_pos": True,
        "dropout": 0.1,
    }
    torch.save({"cfg": cfg, "model": state}, tmp_path / "WavLM.pt")
    encoder = load_encoder(tmp_path / "WavLM.pt")
    assert encoder.normalize is large and encoder.config.padding_rule == "chunks"
    source, padding = foreign.padded_batch()
    with torch.no_grad():
        for row, samples in zip(source, foreign.SAMPLES):
            alone = row[None, :samples]
            foreign.assert_same_states(encoder(alone), foreign.huggingface_states(model, alone))
        # Padded: Microsoft's rule for the frames is fairseq's; beyond that rule the arithmetic is the same.
        hubert, _ = foreign.fairseq("hubert", style)
        theirs = foreign.fairseq_states(hubert, source, padding)
        assert torch.equal(encoder(source, padding).padding_mask, theirs.padding)
        encoder.config = encoder.config.replace(padding_rule="convolution")
        theirs = foreign.huggingface_states(model, source, padding)
        foreign.assert_same_states(encoder(source, padding), theirs)

    cfg["gru_rel_pos"] = False
    torch.save({"cfg": cfg, "model": state}, tmp_path / "WavLM.pt")
    with pytest.raises(ValueError, match="WavLM.pt: its config has gru_rel_pos = False"):
        load_encoder(tmp_path / "WavLM.pt")
