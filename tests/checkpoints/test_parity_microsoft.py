"""The encoder computes what Microsoft's WavLM computes, unpadded and padded; s3prl ships their code."""

from __future__ import annotations

import sys

import pytest
import torch
from messages import says

from skill_fairseq.checkpoints import load_encoder


def wavlm(foreign, style):
    """A random WavLM from Microsoft's code, and the ``cfg`` of its file."""
    sys.modules.setdefault("torchaudio", None)
    from s3prl.upstream.wavlm.WavLM import WavLM, WavLMConfig

    shape, large = foreign.SHAPE[style], style == "large"
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
    return foreign.randomise(WavLM(WavLMConfig(cfg))), cfg


def wavlm_states(foreign, model, source, padding=None):
    with foreign.Recorder(model.post_extract_proj, *model.encoder.layers) as hidden, torch.no_grad():
        x, padding = model.extract_features(source, padding)
    return foreign.States([hidden[0], *(h.transpose(0, 1) for h in hidden[1:])], x, padding)


@pytest.mark.parametrize("style", ["base", "large"])
@pytest.mark.formats("in", "Microsoft WavLM .pt (s3prl's WavLM files are the same)", "Microsoft's code in s3prl")
def test_same_hidden_states_alone_and_padded(foreign, style, tmp_path):
    model, cfg = wavlm(foreign, style)
    torch.save({"cfg": cfg, "model": model.state_dict()}, tmp_path / "WavLM.pt")
    encoder = load_encoder(tmp_path / "WavLM.pt")
    assert encoder.normalize is (style == "large") and encoder.config.padding_rule == "chunks"
    source, padding = foreign.padded_batch()
    with torch.no_grad():
        for row, samples in zip(source, foreign.SAMPLES):
            alone = row[None, :samples]
            foreign.assert_same_states(encoder(alone), wavlm_states(foreign, model, alone))
        theirs = wavlm_states(foreign, model, source, padding)
        foreign.assert_same_states(encoder(source, padding), theirs)
        # Their rule for padded frames differs from transformers'.
        encoder.config = encoder.config.replace(padding_rule="convolution")
        assert not torch.equal(encoder(source, padding).padding_mask, theirs.padding)


def test_relative_position_without_gates_is_refused(foreign, tmp_path):
    model, cfg = wavlm(foreign, "base")
    torch.save({"cfg": {**cfg, "gru_rel_pos": False}, "model": model.state_dict()}, tmp_path / "WavLM.pt")
    with pytest.raises(ValueError, match=says("WavLM.pt", "gru_rel_pos = False")):
        load_encoder(tmp_path / "WavLM.pt")
