"""A batch does not change an utterance's features, except in the architectures that load_encoder documents."""

from __future__ import annotations

import pytest
import torch

from skill_fairseq.audio.batching import length_exact_batches
from skill_fairseq.checkpoints import load_encoder

LENGTHS = (16000, 9150, 16000, 12345, 9150, 7000)


def load(foreign, library, kind, style, folder):
    if library == "transformers":
        foreign.huggingface(kind, style).save_pretrained(folder)
        return load_encoder(folder)
    return load_encoder(foreign.save_fairseq(*foreign.fairseq(kind, style), folder / "model.pt"))


def difference(encoder, source, padding):
    """Largest difference in any state of an utterance between unpadded and padded, on its own frames."""
    worst = 0.0
    with torch.no_grad():
        batch = encoder(source, padding)
        for i, length in enumerate((~padding).sum(1).tolist()):
            alone = encoder(source[i : i + 1, :length])
            for a, b in zip([*alone.hidden_states, alone.x], [*batch.hidden_states, batch.x]):
                worst = max(worst, (a[0] - b[i, : a.size(1)]).abs().max().item())
    return worst


@pytest.mark.parametrize(
    ("library", "kind"), [("transformers", "wavlm"), ("transformers", "hubert"), ("fairseq", "wav2vec2")]
)
def test_large_models_do_not_depend_on_padding(foreign, library, kind, tmp_path):
    encoder = load(foreign, library, kind, "large", tmp_path)
    assert difference(encoder, *foreign.padded_batch()) < 1e-4


@pytest.mark.parametrize(
    ("library", "kind", "style", "field", "value"),
    [
        ("transformers", "wavlm", "base", "extractor_mode", "default"),
        ("fairseq", "hubert", "large", "padding_rule", "chunks"),
        ("transformers", "data2vec-audio", "large", "pos_conv_depth", 5),
        ("fairseq", "data2vec_audio", "large", "pos_conv_depth", 5),
    ],
)
def test_architectures_that_do_and_batches_that_avoid_it(foreign, library, kind, style, field, value, tmp_path):
    encoder = load(foreign, library, kind, style, tmp_path)
    assert getattr(encoder.config, field) == value
    source, padding = foreign.padded_batch(LENGTHS)
    assert difference(encoder, source, padding) > 1e-3
    for batch in length_exact_batches(LENGTHS, max_tokens=40000):
        rows = source[batch, : LENGTHS[batch[0]]]
        assert difference(encoder, rows, torch.zeros_like(rows, dtype=torch.bool)) < 1e-4


def test_one_rule_for_padded_frames_is_all_that_parts_fairseqs_large_hubert(foreign, tmp_path):
    encoder = load(foreign, "fairseq", "hubert", "large", tmp_path)
    encoder.config = encoder.config.replace(padding_rule="convolution")
    assert difference(encoder, *foreign.padded_batch()) < 1e-4
