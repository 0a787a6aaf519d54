"""The encoder computes what transformers' models compute, from every form of their files."""

from __future__ import annotations

import json

import pytest
import torch
from messages import says

from skill_fairseq.checkpoints import load_encoder
from skill_fairseq.modules.relative_position import relative_position_bucket

KINDS = ("wavlm", "hubert", "wav2vec2", "data2vec-audio")
NAMES = {"wavlm": "WavLM", "hubert": "HuBERT", "wav2vec2": "wav2vec 2.0", "data2vec-audio": "data2vec-audio"}
MARKED = [
    pytest.param(kind, marks=pytest.mark.formats("in", f"Hugging Face {NAMES[kind]} folder", "transformers"))
    for kind in KINDS
]
STYLES = ("base", "large")


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", MARKED)
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
    # The mask has an effect, and differs from fairseq's.
    assert (encoder(source).x - ours.x)[~theirs.padding].abs().max() > 1e-2
    chunks = encoder.config.replace(padding_rule="chunks")
    encoder.config = chunks
    assert not torch.equal(encoder(source, padding).padding_mask, theirs.padding)


def test_data2vec_has_one_architecture_whatever_its_config_says(foreign, tmp_path):
    model = foreign.huggingface("data2vec-audio", "large", do_stable_layer_norm=True, feat_extract_norm="group")
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["do_stable_layer_norm"] and written["feat_extract_norm"] == "group"
    source, padding = foreign.padded_batch()
    with torch.no_grad():
        theirs = foreign.huggingface_states(model, source, padding)
        foreign.assert_same_states(load_encoder(tmp_path)(source, padding), theirs)


@pytest.mark.parametrize("name", ["num_conv_pos_embeddings", "conv_pos_kernel_size"])
def test_stacks_that_are_none_are_refused(foreign, name, tmp_path):
    foreign.huggingface("data2vec-audio", "base", **{name: 1}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=says("config.json", f"{name} = 1")):
        load_encoder(tmp_path)


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


def split(folder, form, tensors):
    """A folder with weights in several .bin files and an index, as transformers wrote before safetensors."""
    names = sorted(tensors)
    files = {f"pytorch_model-{i:05}-of-00003.bin": names[i - 1 :: 3] for i in (1, 2, 3)}
    for file, held in files.items():
        torch.save({name: tensors[name] for name in held}, folder / form / file)
    index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
    (folder / form / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.formats("in", "Hugging Face folder: safetensors, .bin, either sharded, both weight norms", "transformers")
def test_every_form_of_the_weights(foreign, kind, tmp_path):
    model = foreign.huggingface(kind, "base")
    names = ("safetensors", "shards", "bin", "bin shards", "bin shards, other names", "other names")
    forms = {name: tmp_path / name for name in names}
    model.save_pretrained(forms["safetensors"], safe_serialization=True)
    model.save_pretrained(forms["shards"], max_shard_size="50KB", safe_serialization=True)
    assert len(list(forms["shards"].glob("*.safetensors"))) > 2
    state = model.state_dict()
    other = dict(state)
    if kind != "data2vec-audio":  # torch renamed weight norm's tensors in 2.0; this is the other naming
        conv = "encoder.pos_conv_embed.conv."
        spellings = (
            ("weight_g", "weight_v"),
            ("parametrizations.weight.original0", "parametrizations.weight.original1"),
        )
        old, new = spellings if conv + "weight_g" in state else spellings[::-1]
        other = {conv + new[old.index(n[len(conv) :])] if n[len(conv) :] in old else n: p for n, p in state.items()}
        assert len(set(other) - set(state)) == 2
    for form in names[2:]:
        forms[form].mkdir()
        (forms[form] / "config.json").write_text((forms["safetensors"] / "config.json").read_text())
    torch.save(state, forms["bin"] / "pytorch_model.bin")
    torch.save(other, forms["other names"] / "pytorch_model.bin")
    split(tmp_path, "bin shards", state)
    split(tmp_path, "bin shards, other names", other)
    expected = load_encoder(forms["safetensors"]).state_dict()
    for form in forms:
        found = load_encoder(forms[form]).state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected), form


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        *((kind, head) for kind in KINDS for head in ("ForCTC", "ForSequenceClassification")),
        ("wavlm", "ForXVector"),
        ("wav2vec2", "ForPreTraining"),
    ],
)
@pytest.mark.formats("in", "Hugging Face folder of a fine-tuned model", "transformers")
def test_models_with_a_head(foreign, kind, head, tmp_path):
    extra = {"tdnn_dim": [8, 8], "tdnn_kernel": [3, 1], "tdnn_dilation": [1, 1], "use_weighted_layer_sum": True}
    model = foreign.huggingface(kind, "large", head, **({} if head == "ForCTC" else extra))
    model.save_pretrained(tmp_path)
    inner = getattr(model, kind.replace("-", "_"))
    source, padding = foreign.padded_batch()
    with torch.no_grad():
        foreign.assert_same_states(
            load_encoder(tmp_path)(source, padding), foreign.huggingface_states(inner, source, padding)
        )


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
