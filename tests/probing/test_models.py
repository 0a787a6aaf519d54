"""Models from command-line words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from messages import says

from skill_fairseq.checkpoints import save_encoder
from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.probing.models import resolve_model


def wave() -> torch.Tensor:
    return torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 0.1


def saved_encoder(path: Path) -> SpeechEncoder:
    torch.manual_seed(7)
    config = EncoderConfig(
        conv_feature_layers="[(8,10,5)] + [(8,8,8)] * 2",
        encoder_layers=2,
        encoder_embed_dim=16,
        encoder_ffn_embed_dim=24,
        encoder_attention_heads=2,
        conv_pos=8,
        conv_pos_groups=2,
    )
    encoder = SpeechEncoder(config)
    save_encoder(encoder, path)
    return encoder.eval()


def test_log_mel_ignores_gain() -> None:
    model = resolve_model("logmel")
    (quiet,), (loud,) = model.features(wave()), model.features(30 * wave())
    assert model.parameters is None and len(quiet) == 1 and quiet[0].shape == (11, 80)
    torch.testing.assert_close(quiet[0], loud[0], atol=1e-4, rtol=0)
    assert quiet[0].mean().abs() < 1e-5 and quiet[0].std() > 0.5


def test_a_file_is_the_encoder_in_it(tmp_path: Path) -> None:
    encoder = saved_encoder(tmp_path / "student.safetensors")
    model = resolve_model(str(tmp_path / "student.safetensors"))
    assert model.parameters == sum(parameter.numel() for parameter in encoder.parameters())
    expected = encoder(wave()[None]).hidden_states
    (states,) = model.features(wave())
    assert len(states) == 3
    for found, state in zip(states, expected):
        torch.testing.assert_close(found, state[0].detach())


def test_random_weights_have_the_same_shape_and_follow_the_seed(tmp_path: Path) -> None:
    path = str(tmp_path / "student.safetensors")
    saved_encoder(Path(path))
    trained, first = resolve_model(path), resolve_model(f"random:{path}", seed=0)
    again, other = resolve_model(f"random:{path}", seed=0), resolve_model(f"random:{path}", seed=1)
    assert first.parameters == trained.parameters
    states = [next(iter(model.features(wave())))[-1] for model in (first, again, trained, other)]
    assert states[0].shape == states[2].shape and torch.equal(states[0], states[1])
    assert (states[0] - states[2]).abs().max() > 0.1 and (states[0] - states[3]).abs().max() > 0.1


def test_names(tmp_path: Path) -> None:
    folder = tmp_path / "lr=0.1"
    folder.mkdir()
    path = str(folder / "student.safetensors")
    saved_encoder(Path(path))
    for word, name in {
        path: path,
        f"student={path}": "student",
        f"random:{path}": f"random:{path}",
        f"same shape=random:{path}": "same shape",
        "baseline=logmel": "baseline",
        "logmel": "logmel",
    }.items():
        assert resolve_model(word).name == name


@pytest.mark.parametrize("word", ["gone.pt", "teacher=gone.pt", "random:gone.pt", "lograin"])
def test_no_such_model(word: str) -> None:
    with pytest.raises(FileNotFoundError, match=says(word.split("=")[-1].split(":")[-1], "random:FILE", "logmel")):
        resolve_model(word)
