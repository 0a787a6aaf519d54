"""The encoder computes what s3prl's converted HuBERT and wav2vec 2.0 compute in s3prl, and data2vec in fairseq."""

from __future__ import annotations

import sys

import pytest
import torch

from skill_fairseq.checkpoints import load_encoder
from skill_fairseq.checkpoints.load import read_source


def converted(model, cfg, path, **changes):
    """The file that s3prl's convert.py writes for a fairseq checkpoint: plain values, unchanged weights."""
    kept = {"task_cfg": cfg["task"], "model_cfg": cfg["model"], "model_weight": model.state_dict()}
    torch.save({**kept, **changes}, path)
    return path


def in_s3prl(kind, path):
    """s3prl's model of a converted file, built like its load_converted_model (which would import torchaudio)."""
    sys.modules.setdefault("torchaudio", None)
    saved = torch.load(path)
    if kind == "hubert":
        from s3prl.upstream.hubert.hubert_model import HubertConfig, HubertModel, HubertPretrainingConfig

        task = HubertPretrainingConfig(label_rate=50.0, sample_rate=16000)
        model = HubertModel(known(HubertConfig, saved["model_cfg"]), task, saved["dictionaries_symbols"])
    else:
        from s3prl.upstream.wav2vec2.wav2vec2_model import Wav2Vec2Config, Wav2Vec2Model

        model = Wav2Vec2Model(known(Wav2Vec2Config, saved["model_cfg"]))
    model.load_state_dict(saved["model_weight"])
    return model.eval()


def known(kind, fields):
    return kind(**{name: value for name, value in fields.items() if name in kind.__dataclass_fields__})


@pytest.mark.parametrize("style", ["base", "large"])
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("hubert", marks=pytest.mark.formats("in", "s3prl's converted HuBERT", "s3prl")),
        pytest.param("wav2vec2", marks=pytest.mark.formats("in", "s3prl's converted wav2vec 2.0", "s3prl")),
    ],
)
def test_same_hidden_states_alone_and_padded(foreign, kind, style, tmp_path):
    from fairseq.data import Dictionary

    symbols = {"dictionaries_symbols": [Dictionary().symbols]} if kind == "hubert" else {}
    path = converted(*foreign.fairseq(kind, style), tmp_path / "converted.pt", **symbols)
    encoder, model = load_encoder(path), in_s3prl(kind, path)
    assert encoder.normalize is (style == "large")
    source, padding = foreign.padded_batch()
    with torch.no_grad():
        for row, samples in zip(source, foreign.SAMPLES):
            alone = row[None, :samples]
            foreign.assert_same_states(encoder(alone), foreign.fairseq_states(model, alone))
        foreign.assert_same_states(encoder(source, padding), foreign.fairseq_states(model, source, padding))


@pytest.mark.formats("in", "s3prl's converted data2vec-audio", "fairseq")
def test_data2vec(foreign, tmp_path):
    model, cfg = foreign.fairseq("data2vec_audio", "large")
    encoder = load_encoder(converted(model, cfg, tmp_path / "converted.pt"))
    source, padding = foreign.padded_batch()
    with torch.no_grad():
        foreign.assert_same_states(encoder(source, padding), foreign.fairseq_states(model, source, padding))


@pytest.mark.parametrize("kind", ["hubert", "wav2vec2", "data2vec_audio"])
def test_the_model_is_known_where_its_config_has_no_name(foreign, kind, tmp_path):
    model, cfg = foreign.fairseq(kind, "base")
    symbols = {"dictionaries_symbols": [["<s>"]]} if kind == "hubert" else {}
    named = load_encoder(converted(model, cfg, tmp_path / "named.pt", **symbols))
    del cfg["model"]["_name"]
    path = converted(model, cfg, tmp_path / "nameless.pt", **symbols)
    assert read_source(path).format == f"s3prl's conversion of {kind!r}"
    assert load_encoder(path).config == named.config
