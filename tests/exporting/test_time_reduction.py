"""Encoders with time reduction and reused attention maps, in everything that uses encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from skill_fairseq.checkpoints import load_encoder, save_encoder
from skill_fairseq.exporting.huggingface_folder import save_huggingface
from skill_fairseq.exporting.model_card import model_card
from skill_fairseq.exporting.onnx_graph import save_onnx
from skill_fairseq.exporting.s3prl_expert import UpstreamExpert
from skill_fairseq.exporting.traceable import NEEDED_TORCH
from skill_fairseq.modules.encoder import SpeechEncoder

OLD_TORCH = tuple(int(number) for number in torch.__version__.split("+")[0].split(".")[:2]) < NEEDED_TORCH


@pytest.fixture(scope="module")
def encoder(small: Any) -> SpeechEncoder:
    return small.random_encoder(
        conv_feature_layers="[(16,10,5)] + [(16,3,4)]", time_reduction=2, reuse_attention=[2, 3]
    )


@pytest.fixture(scope="module")
def speech() -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.randn(2, 1300, generator=torch.Generator().manual_seed(0))
    padding = torch.zeros(2, 1300, dtype=torch.bool)
    padding[1, 700:] = True
    return source.masked_fill(padding, 0.0), padding


@pytest.mark.skipif(OLD_TORCH, reason="torch.export needs a newer torch")
@pytest.mark.slow
def test_onnxruntime(encoder: SpeechEncoder, speech: Any, tmp_path: Path) -> None:
    import onnxruntime

    save_onnx(encoder, tmp_path / "a.onnx", padding_mask=True)
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"))
    assert session.get_modelmeta().custom_metadata_map["downsampling"] == "40"
    for source, padding in (speech, (speech[0][:1, :777], speech[1][:1, :777])):
        wanted = encoder(source, padding)
        *states, mask = session.run(None, {"source": source.numpy(), "padding_mask": padding.numpy()})
        assert torch.equal(torch.from_numpy(mask), wanted.padding_mask)
        kept = ~wanted.padding_mask
        for found, state in zip(states, [wanted.x, *wanted.hidden_states]):
            torch.testing.assert_close(torch.from_numpy(found)[kept], state[kept], rtol=1e-4, atol=1e-4)


def test_transformers(encoder: SpeechEncoder, speech: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    assert save_huggingface(encoder, tmp_path / "hf") == "SkillModel"
    model = transformers.AutoModel.from_pretrained(tmp_path / "hf", trust_remote_code=True).float().eval()
    source, padding = speech
    found = model(source, attention_mask=(~padding).long(), output_hidden_states=True)
    wanted = encoder(source, padding)
    assert all(torch.equal(a, b) for a, b in zip(found.hidden_states, wanted.hidden_states))
    assert torch.equal(found.last_hidden_state, wanted.x)


def test_s3prl_and_the_card_say_the_rate(encoder: SpeechEncoder, tmp_path: Path) -> None:
    save_encoder(encoder, tmp_path / "a.safetensors")
    assert load_encoder(tmp_path / "a.safetensors").config == encoder.config
    expert = UpstreamExpert(str(tmp_path / "a.safetensors"))
    out = expert([torch.randn(1300), torch.randn(800)])
    assert expert.get_downsample_rates("hidden_states") == 40
    assert {state.size(1) for state in out["hidden_states"]} == {encoder.config.num_output_frames(1300)}
    assert "every 40 samples (2.5 ms)" in model_card(encoder, {}, "", "s3prl")
