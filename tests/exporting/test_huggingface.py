"""Hugging Face folders: stock models if nothing was pruned, own code otherwise, config, types, model card."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from messages import says
from safetensors.torch import load_file

from skill_fairseq.checkpoints import load_encoder
from skill_fairseq.checkpoints.own_folders import read_own_folder
from skill_fairseq.exporting.describe import describe
from skill_fairseq.exporting.huggingface_folder import save_huggingface, stock_type

DATA2VEC = {"relative_position": False, "pos_conv_depth": 3, "conv_pos": 15, "extractor_mode": "layer_norm"}
LARGE = {"extractor_mode": "layer_norm", "layer_norm_first": True, "conv_bias": True, "normalize": True}


@pytest.fixture
def transformers():
    # PyPI's torchaudio cannot be imported with a CPU torch, and transformers tries.
    sys.modules.setdefault("torchaudio", None)
    import transformers

    return transformers


@pytest.mark.parametrize(
    ("changes", "name", "said"),
    [
        pytest.param(
            {},
            "WavLMModel",
            {},
            marks=pytest.mark.formats("out", "Hugging Face WavLM folder", "transformers (unpruned students)"),
        ),
        ({**LARGE}, "WavLMModel", {}),
        pytest.param(
            {"relative_position": False},
            "HubertModel",
            {},
            marks=pytest.mark.formats("out", "Hugging Face HuBERT folder", "transformers (unpruned students)"),
        ),
        ({"relative_position": False, "feature_layer_norm": False}, "HubertModel", {"source_format": "wav2vec2"}),
        pytest.param(
            {"relative_position": False, **LARGE, "activation_fn": "relu"},
            "Wav2Vec2Model",
            {"source_format": "a fairseq checkpoint of model 'wav2vec2'"},
            marks=pytest.mark.formats("out", "Hugging Face wav2vec 2.0 folder", "transformers (unpruned students)"),
        ),
        pytest.param(
            DATA2VEC,
            "Data2VecAudioModel",
            {},
            marks=pytest.mark.formats("out", "Hugging Face data2vec-audio folder", "transformers (unpruned students)"),
        ),
    ],
)
def test_stock_models_need_no_code(exporting, small, transformers, changes, name, said, tmp_path):
    encoder = small.random_encoder(padding_rule="convolution", **changes)
    assert save_huggingface(encoder, tmp_path / "a", said) == name
    assert not list((tmp_path / "a").glob("*.py"))
    model, report = transformers.AutoModel.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert type(model).__name__ == name and not any(report.values())
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "a")
    waves = [small.waves(samples, 1, seed)[0] for seed, samples in enumerate((6000, 4100))]
    inputs = extractor([w.numpy() for w in waves], sampling_rate=16000, return_tensors="pt", padding=True)
    source = inputs["input_values"]
    if encoder.normalize:  # it adds 1e-7 to the variance, fairseq 1e-5
        exact = (waves[0] - waves[0].mean()) / (waves[0].var(unbiased=False) + 1e-7).sqrt()
        assert (source[0] - exact).abs().max() < 1e-5
        assert (source[0] - F.layer_norm(waves[0], waves[0].shape)).abs().max() < 1e-2
    else:
        assert torch.equal(source[0], waves[0])
    padding = torch.arange(6000) >= torch.tensor([[6000], [4100]])
    with torch.no_grad():
        theirs = model(**inputs, output_hidden_states=True)
        ours = encoder(source, padding)
    # Theirs start after the positional convolution, and the last one is after the final LayerNorm.
    wanted = [*ours.hidden_states[1:-1], ours.x]
    exporting.assert_same([*theirs.hidden_states[1:-1], theirs.last_hidden_state], wanted, ours.padding_mask)
    again = load_encoder(tmp_path / "a")
    unused = {} if encoder.config.relative_position else {"num_buckets": 32, "max_distance": 40}
    assert again.config.replace(**unused) == encoder.config
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in encoder.state_dict().items())


def test_what_is_pruned_gated_or_scaled_has_its_own_code(small):
    assert stock_type(small.random_encoder(), {}) == "wavlm"
    for changes in (
        {"ffn_dims": [48, 47, 48]},
        {"heads": [[0, 1, 2, 3], [1], None]},
        {"pruning_units": ["conv"]},
        {**DATA2VEC, "layer_norm_first": True},
        {**DATA2VEC, "extractor_mode": "default"},
        {"feature_layer_norm": False},
        {"conv_feature_layers": "[(16,10,5)] + [(16,3,2)] * 4 + [(32,2,2)] * 2", "feature_linear": False},
    ):
        assert stock_type(small.random_encoder(**changes), {}) is None
    encoder = small.random_encoder()
    encoder.feature_extractor.scale[2] = 0.5
    assert stock_type(encoder, {}) is None


def test_gates_normalisation_and_type_go_along(exporting, small, tmp_path):
    encoder = small.random_encoder(pruning_units=["heads", "ffn", "conv"], **LARGE)
    for _, gate in encoder.named_gates():
        gate.set_kept(torch.arange(gate.num_units) % 3 != 1)
    assert save_huggingface(encoder, tmp_path / "a", {"a": 1}, "bfloat16") == "SkillModel"
    fields = json.loads((tmp_path / "a" / "config.json").read_text())
    assert fields["torch_dtype"] == "bfloat16"
    assert json.loads((tmp_path / "a" / "preprocessor_config.json").read_text())["do_normalize"] is True
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    assert tensors["encoder.transformer.layers.0.ffn.fc1.weight"].dtype == torch.bfloat16
    assert tensors["encoder.gates.log_alpha"].dtype == torch.float32
    found = describe(tmp_path / "a")
    assert found.config == encoder.config and found.provenance == {"a": 1}
    assert found.types == ["bfloat16", "float32"]
    code = """
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).float()
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2]), output_hidden_states=True).to_tuple(), sys.argv[3])
"""
    source = small.waves()
    torch.save(source, tmp_path / "source.pt")
    exporting.run_without_package(code, tmp_path / "a", tmp_path / "source.pt", tmp_path / "o.pt")
    x, states = torch.load(tmp_path / "o.pt")
    rounded = read_own_folder(tmp_path / "a")
    again = small.random_encoder(pruning_units=["heads", "ffn", "conv"], **LARGE)
    again.load_state_dict({k: rounded.state["encoder." + k].to(v.dtype) for k, v in again.state_dict().items()})
    exporting.assert_same([*states, x], exporting.states_of(again, source))
    assert (exporting.states_of(again, source)[-1] - exporting.states_of(encoder, source)[-1]).abs().max() > 1e-3


def test_attention_masks_are_checked(small, transformers):
    from skill_fairseq.exporting.configuration_skill import SkillConfig
    from skill_fairseq.exporting.modeling_skill import SkillModel

    encoder = small.random_encoder(padding_rule="convolution")
    model = SkillModel(SkillConfig(encoder_shape=encoder.config.to_dict())).eval()
    model.encoder.load_state_dict(encoder.state_dict(), strict=False)
    source = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(4000) < torch.tensor([[4000], [2000]])).long()
    wanted = encoder(source, mask == 0).x
    for dtype in (torch.int64, torch.bool, torch.float32):
        assert torch.equal(model(source, mask.to(dtype)).last_hidden_state, wanted)
    for wrong, said in ((mask[:, :12], "(2, 12)"), (mask * 3, "0 and 1"), (mask.flip(1), "row 1")):
        with pytest.raises(ValueError, match=says("attention_mask", said)):
            model(source, wrong)
