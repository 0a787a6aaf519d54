"""The encoder computes what transformers' models compute, through every form of their files."""

from __future__ import annotations

import json
import re

import pytest
import torch

from skill_fairseq.checkpoints import load_encoder
from skill_fairseq.modules.relative_position import relative_position_bucket

KINDS = ("wavlm", "hubert", "wav2vec2")
STYLES = ("base", "large")


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", KINDS)
def test_same_hidden_states_alone_and_padded(foreign, kind, style, tmp_path):
    model = foreign.huggingface(kind, style)
    model.save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    assert not encoder.training and all(p.requires_grad for p in encoder.parameters())
    source, padding = foreign.padded_batch()
    with torch.no_grad():
        for row, samples in zip(source, foreign.SAMPLES):
            alone = row[None, :samples]
            foreign.assert_same_states(encoder(alone), foreign.huggingface_states(model, alone))
        foreign.assert_same_states(encoder(source), foreign.huggingface_states(model, source))
        theirs = foreign.huggingface_states(model, source, padding)
        ours = encoder(source, padding)
        foreign.assert_same_states(ours, theirs)
    # The mask does something, and it is not fairseq's.
    assert (encoder(source).x - ours.x)[~theirs.padding].abs().max() > 1e-2
    chunks = encoder.config.replace(padding_rule="chunks")
    encoder.config = chunks
    assert not torch.equal(encoder(source, padding).padding_mask, theirs.padding)


def test_relative_position_reaches_every_layer(foreign, tmp_path):
    model = foreign.huggingface("wavlm", "base")
    model.save_pretrained(tmp_path)
    encoder, source = load_encoder(tmp_path), foreign.padded_batch((16000,))[0]
    with torch.no_grad():
        before = encoder(source).hidden_states
        for layer in encoder.transformer.layers:
            layer.attention.position_gate.grep_a.add_(0.5)
            after = encoder(source).hidden_states
            assert (after[-1] - before[-1]).abs().max() > 1e-3
            before = after


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(320, 800), (320, 1280), (16, 24)])
def test_relative_position_buckets_at_every_distance(foreign, num_buckets, max_distance):
    theirs = foreign.huggingface("wavlm", "base", num_buckets=num_buckets, max_bucket_distance=max_distance)
    offsets = torch.arange(-2000, 2001)
    expected = theirs.encoder.layers[0].attention._relative_positions_bucket(offsets)
    assert torch.equal(relative_position_bucket(offsets, num_buckets, max_distance), expected)
    assert expected.unique().numel() > 0.9 * num_buckets


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_of_the_weights(foreign, kind, tmp_path):
    model = foreign.huggingface(kind, "base")
    forms = {name: tmp_path / name for name in ("safetensors", "shards", "bin", "old names", "with head")}
    model.save_pretrained(forms["safetensors"], safe_serialization=True)
    model.save_pretrained(forms["shards"], max_shard_size="50KB", safe_serialization=True)
    assert len(list(forms["shards"].glob("*.safetensors"))) > 2
    state = model.state_dict()
    old = {
        re.sub("parametrizations.weight.original", "weight_", name).replace("_0", "_g").replace("_1", "_v"): p
        for name, p in state.items()
    }
    assert "encoder.pos_conv_embed.conv.weight_g" in old
    head = {f"{kind}.{name}": p for name, p in state.items()}
    head.update({"lm_head.weight": torch.ones(2, 48), "lm_head.bias": torch.ones(2)})
    for form, tensors in (("bin", state), ("old names", old), ("with head", head)):
        forms[form].mkdir()
        (forms[form] / "config.json").write_text((forms["safetensors"] / "config.json").read_text())
        torch.save(tensors, forms[form] / "pytorch_model.bin")
    expected = load_encoder(forms["safetensors"]).state_dict()
    for form in forms:
        found = load_encoder(forms[form]).state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected), form


@pytest.mark.parametrize(
    ("style", "preprocessor", "normalize"),
    [
        ("base", None, False),
        ("large", None, True),
        ("base", {"do_normalize": True}, True),
        ("large", {"do_normalize": False}, False),
    ],
)
def test_normalisation_is_read_from_the_preprocessor(foreign, style, preprocessor, normalize, tmp_path):
    foreign.huggingface("hubert", style).save_pretrained(tmp_path)
    if preprocessor is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    encoder = load_encoder(tmp_path)
    assert encoder.normalize is normalize
    assert encoder.config.padding_rule == "convolution"
