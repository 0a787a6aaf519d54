"""The encoder computes what fairseq's HuBERT, wav2vec 2.0 and data2vec-audio compute."""

from __future__ import annotations

import argparse

import pytest
import torch

from skill_fairseq.checkpoints import load_encoder

KINDS = [
    pytest.param(kind, marks=pytest.mark.formats("in", f"fairseq {name} checkpoint", "fairseq"))
    for kind, name in (("hubert", "HuBERT"), ("wav2vec2", "wav2vec 2.0"), ("data2vec_audio", "data2vec-audio"))
]


@pytest.mark.parametrize("style", ["base", "large"])
@pytest.mark.parametrize("kind", KINDS)
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
        # fairseq's two models count padded frames by different rules, and this batch distinguishes them.
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


@pytest.mark.parametrize("depth", [2, 3])
def test_stacked_positional_convolutions_whatever_the_model(foreign, depth, tmp_path):
    model, cfg = foreign.fairseq("wav2vec2", "base", pos_conv_depth=depth, conv_pos=8)  # kernels of 4 and 3 frames
    encoder = load_encoder(foreign.save_fairseq(model, cfg, tmp_path / "model.pt"))
    source, padding = foreign.padded_batch()
    with torch.no_grad():
        foreign.assert_same_states(encoder(source, padding), foreign.fairseq_states(model, source, padding))


def test_data2vec_leaves_its_moving_average_behind(foreign, tmp_path):
    model, cfg = foreign.fairseq("data2vec_audio", "base")
    state = model.state_dict()
    assert state["_ema"] and all(torch.is_tensor(tensor) for tensor in state["_ema"].values())
    encoder = load_encoder(foreign.save_fairseq(state, cfg, tmp_path / "model.pt"))
    expected = model.encoder.layers[1].fc1.weight
    assert torch.equal(encoder.transformer.layers[1].ffn.fc1.weight, expected)
    assert not torch.equal(state["_ema"]["layers.1.fc1.weight"], expected)


def test_data2vec_is_a_teacher_and_a_student(foreign, small, speech, tmp_path):
    path = foreign.save_fairseq(*foreign.fairseq("data2vec_audio", "large"), tmp_path / "model.pt")
    foreign.assert_teaches_and_learns(small, speech, path, tmp_path)


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
