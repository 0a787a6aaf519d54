"""Checkpoints fine-tuned by fairseq's hubert_ctc and wav2vec_ctc: the encoder inside gives the same results."""

from __future__ import annotations

import argparse
import types

import pytest
import torch
from messages import says

from skill_fairseq.checkpoints import load_encoder
from skill_fairseq.checkpoints.load import read_source


def fine_tuned(foreign, kind, pretrained, folder, normalize):
    """fairseq's CTC model from a pre-trained checkpoint, and the checkpoint that its trainer would save."""
    from fairseq.data import Dictionary
    from fairseq.models.hubert.hubert_asr import HubertCtc, HubertCtcConfig
    from fairseq.models.wav2vec.wav2vec2_asr import Wav2Vec2CtcConfig, Wav2VecCtc
    from omegaconf import OmegaConf

    model_class, config = {
        "hubert_ctc": (HubertCtc, HubertCtcConfig),
        "wav2vec_ctc": (Wav2VecCtc, Wav2Vec2CtcConfig),
    }[kind]
    changes = {"ddp_backend": "legacy_ddp"} if kind == "wav2vec_ctc" else {}
    cfg = OmegaConf.structured(config(w2v_path=str(pretrained), normalize=normalize, data=".", **changes))
    task = types.SimpleNamespace(target_dictionary=Dictionary(), state_dict=dict)
    model = foreign.randomise(model_class.build_model(cfg, task), seed=7)
    assert model.w2v_encoder.proj is not None and cfg.w2v_args is not None
    written = OmegaConf.to_container(cfg, enum_to_str=True)
    written = {"model": {**written, "_name": kind}, "task": {"_name": "audio_finetuning", "normalize": normalize}}
    return model, written, foreign.save_fairseq(model, written, folder / "fine_tuned.pt")


@pytest.mark.parametrize("style", ["base", "large"])
@pytest.mark.parametrize(
    ("inner", "kind"),
    [
        pytest.param("hubert", "hubert_ctc", marks=pytest.mark.formats("in", "fairseq hubert_ctc", "fairseq")),
        pytest.param("wav2vec2", "wav2vec_ctc", marks=pytest.mark.formats("in", "fairseq wav2vec_ctc", "fairseq")),
        pytest.param(
            "data2vec_audio",
            "wav2vec_ctc",
            marks=pytest.mark.formats("in", "fairseq wav2vec_ctc of data2vec-audio", "fairseq"),
        ),
    ],
)
def test_same_hidden_states_alone_and_padded(foreign, inner, kind, style, tmp_path):
    pretrained, cfg = foreign.fairseq(inner, style)
    state = {name: tensor for name, tensor in pretrained.state_dict().items() if name != "_ema"}
    path = foreign.save_fairseq(state, cfg, tmp_path / "pretrained.pt")
    model, _, path = fine_tuned(foreign, kind, path, tmp_path, normalize=style == "large")
    (tmp_path / "pretrained.pt").unlink()
    encoder = load_encoder(path)
    assert encoder.normalize is (style == "large")
    assert read_source(path).format == f"a fairseq checkpoint of model {kind!r}, fine-tuned from {inner!r}"
    model = model.w2v_encoder.w2v_model
    source, padding = foreign.padded_batch()
    with torch.no_grad():
        for row, samples in zip(source, foreign.SAMPLES):
            alone = row[None, :samples]
            foreign.assert_same_states(encoder(alone), foreign.fairseq_states(model, alone))
        foreign.assert_same_states(encoder(source, padding), foreign.fairseq_states(model, source, padding))


@pytest.mark.formats("in", "own student fine-tuned by hubert_ctc", "fairseq")
def test_own_student(foreign, tmp_path):
    kept = {"conv_channels": [9, 16, 7, 8, 16, 5, 11], "heads": [[0, 3], [1]], "ffn_dims": [80, 13]}
    student, cfg = foreign.own_model("skill_student", **kept)
    cfg["task"] = {"_name": "skill_distillation", "data": ".", "normalize": True, "sample_rate": 16000}
    pretrained = foreign.save_fairseq(foreign.randomise(student), cfg, tmp_path / "student.pt", task_state={})
    model, _, path = fine_tuned(foreign, "hubert_ctc", pretrained, tmp_path, normalize=True)
    pretrained.unlink()
    encoder = load_encoder(path)
    assert encoder.config.heads == kept["heads"] and encoder.normalize
    source, padding = foreign.padded_batch()
    with torch.no_grad():
        x = encoder(source, padding).x
        logits = model(source=source, padding_mask=padding)["encoder_out"]
        assert torch.equal(model.w2v_encoder.proj(x.transpose(0, 1)), logits)


def test_configs_of_fairseq_before_hydra(foreign, tmp_path):
    pretrained, cfg = foreign.fairseq("wav2vec2", "large")
    path = foreign.save_fairseq(pretrained, cfg, tmp_path / "pretrained.pt")
    model, _, path = fine_tuned(foreign, "wav2vec_ctc", path, tmp_path, normalize=True)
    expected = load_encoder(path)
    fields = {name: value for name, value in cfg["model"].items() if name not in ("_name", "normalize")}
    inner = argparse.Namespace(arch="wav2vec2", **fields)
    args = argparse.Namespace(arch="wav2vec_ctc", normalize=True, w2v_args=inner, w2v_path="gone.pt")
    found = load_encoder(foreign.save_fairseq(model, None, tmp_path / "old.pt", args=args))
    assert found.config == expected.config and found.normalize


def test_without_the_pretrained_config_it_says_what_to_do(foreign, tmp_path):
    pretrained, cfg = foreign.fairseq("hubert", "base")
    path = foreign.save_fairseq(pretrained, cfg, tmp_path / "pretrained.pt")
    model, written, _ = fine_tuned(foreign, "hubert_ctc", path, tmp_path, normalize=False)
    written["model"]["w2v_args"] = None
    path = foreign.save_fairseq(model, written, tmp_path / "bare.pt")
    with pytest.raises(ValueError, match=says("bare.pt", "w2v_args", "audio_finetuning", "pretrained.pt")):
        load_encoder(path)


def test_other_weights_of_the_encoder_are_left_over_and_those_of_other_parts_named(foreign, tmp_path, caplog):
    pretrained, cfg = foreign.fairseq("hubert", "base")
    path = foreign.save_fairseq(pretrained, cfg, tmp_path / "pretrained.pt")
    model, written, _ = fine_tuned(foreign, "hubert_ctc", path, tmp_path, normalize=False)
    name = "w2v_encoder.w2v_model.encoder.adapter.weight"
    path = foreign.save_fairseq({**model.state_dict(), name: torch.ones(1)}, written, tmp_path / "more.pt")
    with pytest.raises(ValueError, match=says("1 left over", "encoder.adapter.weight")):
        load_encoder(path)
    path = foreign.save_fairseq(
        {**model.state_dict(), "w2v_encoder.adapter.weight": torch.ones(1)}, written, tmp_path / "head.pt"
    )
    caplog.set_level("INFO")
    load_encoder(path)
    assert "ignored" in caplog.text and "w2v_encoder.adapter.weight" in caplog.text
