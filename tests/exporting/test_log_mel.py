"""Encoders on log-mel features, in everything that uses encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from messages import says

from skill_fairseq.benchmarking.contestants import huggingface_encoder
from skill_fairseq.checkpoints import load_encoder, save_encoder
from skill_fairseq.exporting.describe import as_rows, describe
from skill_fairseq.exporting.huggingface_folder import save_huggingface
from skill_fairseq.exporting.onnx_graph import make_onnx
from skill_fairseq.exporting.s3prl_expert import UpstreamExpert
from skill_fairseq.exporting.traceable import NEEDED_TORCH, SpectrumByProducts
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.size import widths_of
from skill_fairseq.pruning.latency import conv_share

OLD_TORCH = tuple(int(number) for number in torch.__version__.split("+")[0].split(".")[:2]) < NEEDED_TORCH
SHAPE = {"mel_bins": 40, "conv_feature_layers": "[(16,3,1), (24,3,2)]", "encoder_layers": 1}


@pytest.fixture(scope="module")
def encoder(small: Any) -> SpeechEncoder:
    return small.random_encoder(**SHAPE, conv_channels=[11, 24])


@pytest.fixture(scope="module")
def wave(small: Any) -> torch.Tensor:
    return torch.from_numpy(small.tone(1.0, seed=3))[None]


def test_a_spectrum_by_products_is_that_by_fourier_transforms(encoder: SpeechEncoder, wave: torch.Tensor) -> None:
    log_mel = encoder.feature_extractor.log_mel
    quiet = torch.cat([wave, 1e-4 * wave, torch.zeros_like(wave)], 1)
    torch.testing.assert_close(SpectrumByProducts(log_mel)(quiet).mT, log_mel(quiet), rtol=0, atol=1e-4)


@pytest.mark.skipif(OLD_TORCH, reason="torch.export needs a newer torch")
@pytest.mark.slow
def test_onnxruntime(encoder: SpeechEncoder, wave: torch.Tensor) -> None:
    import onnxruntime

    from skill_fairseq.exporting.onnx_precision import to_float16, to_int8

    model = make_onnx(encoder)

    def states(model: Any, source: torch.Tensor) -> list[torch.Tensor]:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return [torch.from_numpy(found) for found in session.run(None, {"source": source.numpy()})]

    with torch.no_grad():
        for n in (400, 719, 720, 5000, 16000):
            out = encoder(wave[:, :n])
            for found, wanted in zip(states(model, wave[:, :n]), [out.x, *out.hidden_states]):
                torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    # The spectrum keeps float32 weights and sums, so quiet parts beside loud ones do not change.
    quiet = torch.cat([wave, 1e-3 * wave], 1)
    wanted = encoder(quiet).hidden_states[0]
    for small in (to_float16(model), to_int8(model)):
        spectra = [i for i in small.graph.initializer if list(i.dims) == [402, 1, 400]]
        assert [i.data_type for i in spectra] == [1]  # float32
        error = (states(small, quiet)[1] - wanted).abs().mean() / wanted.abs().mean()
        assert error < 0.002


@pytest.mark.parametrize("whole", [True, False])
def test_transformers_takes_it_with_our_code(small: Any, wave: torch.Tensor, tmp_path: Path, whole: bool) -> None:
    """Not as a stock model, even if nothing is pruned."""
    transformers = pytest.importorskip("transformers")
    shape = {} if whole else {"conv_channels": [11, 24]}
    encoder = small.random_encoder(**SHAPE, **shape)
    assert save_huggingface(encoder, tmp_path / "hf") == "SkillModel"
    model = transformers.AutoModel.from_pretrained(tmp_path / "hf", trust_remote_code=True).float().eval()
    with torch.no_grad():
        found, wanted = model(wave, output_hidden_states=True), encoder(wave)
    assert all(torch.equal(a, b) for a, b in zip(found.hidden_states, wanted.hidden_states))


def test_the_stock_models_of_transformers_cannot_hold_it(encoder: SpeechEncoder) -> None:
    with pytest.raises(ValueError, match=says("--against transformers", "mel_bins=40", "onnxruntime")):
        huggingface_encoder(encoder.config)


def test_s3prl_and_files(encoder: SpeechEncoder, wave: torch.Tensor, tmp_path: Path) -> None:
    save_encoder(encoder, tmp_path / "a.safetensors")
    again = load_encoder(tmp_path / "a.safetensors")
    assert again.config == encoder.config and torch.equal(again(wave).x, encoder(wave).x)
    states = UpstreamExpert(str(tmp_path / "a.safetensors"))([wave[0], wave[0, :9000]])["hidden_states"]
    torch.testing.assert_close(states[-1][0], encoder(wave).hidden_states[-1][0], rtol=1e-4, atol=1e-4)
    assert ("input", "40 log-mel features every 10 ms") in list(as_rows(describe(tmp_path / "a.safetensors")))


def test_the_conv_share_of_latency_counts_the_features(encoder: SpeechEncoder) -> None:
    left, full = 11 * 40 * 3 + 11 * 24 * 3 / 2, 16 * 40 * 3 + 16 * 24 * 3 / 2
    assert conv_share(encoder.config, widths_of(encoder.config)["conv"]) == pytest.approx(left / full)
