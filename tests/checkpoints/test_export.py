"""The exported file: self-describing, complete, harmless."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from messages import says
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from skill_fairseq.checkpoints import load_encoder, save_encoder
from skill_fairseq.checkpoints.load import read_source
from skill_fairseq.modules.config import wavlm_base
from skill_fairseq.modules.encoder import SpeechEncoder

TINY = {
    "conv_feature_layers": "[(16,10,5)] + [(16,3,2)] * 4 + [(16,2,2)] * 2",
    "encoder_layers": 3,
    "encoder_embed_dim": 48,
    "encoder_ffn_embed_dim": 80,
    "encoder_attention_heads": 4,
    "conv_pos": 16,
    "conv_pos_groups": 4,
}
SHAPES = {
    "full": {},
    "gated": {"pruning_units": ["conv", "heads", "ffn", "attention_layers", "ffn_layers"]},
    "shrunk": {
        "conv_channels": [7, 8, 9, 10, 11, 12, 13],
        "heads": [[0, 2], [], None],
        "ffn_dims": [0, None, 17],
        "original_parameters": 12345,
    },
}


@pytest.fixture(params=SHAPES)
def encoder(request, foreign) -> SpeechEncoder:
    model = foreign.randomise(SpeechEncoder(wavlm_base(**TINY, **SHAPES[request.param])))
    model.feature_extractor.scale.uniform_(0.5, 1.0)
    for _, gate in model.named_gates():
        gate.set_kept(torch.arange(gate.num_units) % 3 != 1)
    return model


def test_round_trip_is_exact(encoder, foreign, tmp_path):
    path = tmp_path / "encoder.safetensors"
    save_encoder(encoder, path, {"source": "teacher.pt", "groups": [[0, 1], [2]]})
    found = load_encoder(path)
    assert found.config == encoder.config
    assert found.state_dict().keys() == encoder.state_dict().keys()
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in encoder.state_dict().items())
    with torch.no_grad():
        assert torch.equal(found(*foreign.padded_batch()).x, encoder(*foreign.padded_batch()).x)
    assert read_source(path).provenance == {"source": "teacher.pt", "groups": [[0, 1], [2]]}
    assert [entry.name for entry in tmp_path.iterdir()] == ["encoder.safetensors"]


def test_the_file_describes_itself_and_holds_the_encoder_alone(encoder, tmp_path):
    path = tmp_path / "encoder.safetensors"
    save_encoder(encoder, path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata.keys() == {"format", "format_version", "config", "provenance"}
    assert metadata["format"] == "skill_fairseq.encoder" and metadata["format_version"] == "1"
    assert json.loads(metadata["config"])["heads"] == encoder.config.heads
    values = sum(tensor.numel() for tensor in load_file(path).values())
    gates = sum(2 * gate.num_units for _, gate in encoder.named_gates())  # log_alpha and the kept units
    scale = encoder.feature_extractor.scale.numel()
    assert values == encoder.num_parameters() + gates + scale


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-2), ("bfloat16", 2e-1)])
def test_half_precision_files_load_as_float32(encoder, foreign, dtype, tolerance, tmp_path):
    save_encoder(encoder, tmp_path / "32.safetensors")
    save_encoder(encoder, tmp_path / "16.safetensors", dtype=dtype)
    sizes = [(tmp_path / name).stat().st_size for name in ("16.safetensors", "32.safetensors")]
    assert 0.5 < sizes[0] / sizes[1] < 0.62  # names and gates do not change
    found = load_encoder(tmp_path / "16.safetensors")
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    for name, tensor in encoder.state_dict().items():
        kept = name.endswith((".log_alpha", ".kept_override"))
        stored = tensor if kept else tensor.to(getattr(torch, dtype)).float()
        assert torch.equal(found.state_dict()[name], stored), name
    with torch.no_grad():
        difference = found(*foreign.padded_batch()).x - encoder(*foreign.padded_batch()).x
    assert 0 < difference.abs().max() < tolerance


def test_what_float16_cannot_hold_is_refused_and_nothing_is_written(encoder, tmp_path):
    with torch.no_grad():
        encoder.transformer.layer_norm.weight[3] = 1e6
    with pytest.raises(ValueError, match=says("transformer.layer_norm.weight", "too large", "float16")):
        save_encoder(encoder, tmp_path / "a.safetensors", dtype="float16")
    with torch.no_grad():
        encoder.transformer.layer_norm.weight[3] = float("nan")
    with pytest.raises(ValueError, match=says("transformer.layer_norm.weight", "NaN")):
        save_encoder(encoder, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=says("dtype", "'int8'", "float16")):
        save_encoder(encoder, tmp_path / "a.safetensors", dtype="int8")
    assert not list(tmp_path.iterdir())


def test_truncated_foreign_and_future_files(encoder, tmp_path):
    path = tmp_path / "encoder.safetensors"
    save_encoder(encoder, path)
    whole = path.read_bytes()
    for size in (50, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=says("encoder.safetensors", "truncated", "bytes")):
            load_encoder(path)
    path.write_bytes(whole)
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}  # not views of the file
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    for changes, said in (
        ({"format": "pt"}, ["metadata"]),
        ({"format_version": "2"}, ["format_version", "'2'", "upgrade"]),
        ({"config": "{"}, ["config"]),
        ({"config": json.dumps({"encoder_layers": 2, "rotary": True})}, ["config", "['rotary']"]),
        ({"config": json.dumps({**json.loads(metadata["config"]), "heads": [[9]]})}, ["config", "model.heads"]),
    ):
        save_file(tensors, path, {**metadata, **changes})
        with pytest.raises(ValueError, match=says(path, *said)):
            load_encoder(path)
    del tensors["transformer.layer_norm.bias"]
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=says("1 missing", "transformer.layer_norm.bias")):
        load_encoder(path)


ALONE = """
import sys

class Installed:
    finders = list(sys.meta_path)

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in ("fairseq", "hydra", "omegaconf"):
            return None
        specs = (finder.find_spec(name, path, target) for finder in cls.finders)
        return next((spec for spec in specs if spec is not None), None)

sys.meta_path[:] = [Installed]
import safetensors.torch
import torch
batch, wanted = torch.load(sys.argv[2])
before = set(sys.modules)
import skill_fairseq
with torch.no_grad():
    out = skill_fairseq.load_encoder(sys.argv[1])(*batch)
assert torch.allclose(out.x, wanted, rtol=0, atol=1e-5)
new = {name.partition(".")[0]: module for name, module in sys.modules.items() if name not in before}
print(*(name for name, module in new.items() if "site-packages" in (getattr(module, "__file__", None) or "")
        and name not in ("skill_fairseq", "torch", "safetensors", "numpy")), sep=",")
"""


@pytest.mark.slow
def test_reading_it_needs_torch_and_safetensors_alone(encoder, foreign, tmp_path):
    save_encoder(encoder, tmp_path / "encoder.safetensors")
    batch = foreign.padded_batch()
    with torch.no_grad():
        torch.save((batch, encoder(*batch).x), tmp_path / "batch.pt")
    command = [sys.executable, "-c", ALONE, str(tmp_path / "encoder.safetensors"), str(tmp_path / "batch.pt")]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout + done.stderr
