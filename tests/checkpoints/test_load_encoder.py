"""load_encoder: own checkpoints, missing, truncated and foreign files, and use without fairseq."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from messages import says

import skill_fairseq
from skill_fairseq.checkpoints import load_encoder, save_encoder
from skill_fairseq.checkpoints.load import read_source
from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.encoder import SpeechEncoder


def same_outputs(first: SpeechEncoder, second: SpeechEncoder, source, padding) -> bool:
    with torch.no_grad():
        a, b = first(source, padding), second(source, padding)
    return all(torch.equal(x, y) for x, y in zip([a.x, *a.hidden_states], [b.x, *b.hidden_states]))


def test_pretraining_checkpoint(foreign, tmp_path):
    model, cfg = foreign.own_model("wavlm")
    foreign.randomise(model)
    path = foreign.save_fairseq(model, cfg, tmp_path / "checkpoint_last.pt")
    encoder = load_encoder(path)
    assert encoder.config.relative_position and encoder.normalize and not encoder.training
    assert same_outputs(encoder, model.speech_encoder, *foreign.padded_batch())
    assert read_source(path).provenance["num_updates"] == 400


def test_gated_and_shrunk_students(foreign, tmp_path):
    model, cfg = foreign.own_model("skill_student", pruning_units=["conv", "heads", "ffn"])
    foreign.randomise(model)
    with torch.no_grad():
        for _, gate in model.speech_encoder.named_gates():
            gate.log_alpha.copy_(torch.linspace(-4, 4, gate.num_units))
    cfg["criterion"] = {"_name": "skill_group_kd", "groups": [[0, 1], [2]], "target_sparsity": 0.5}
    path = foreign.save_fairseq(model, cfg, tmp_path / "stage1.pt")
    gated = load_encoder(path)
    assert gated.config.pruning_units == ["conv", "heads", "ffn"]
    assert same_outputs(gated, model.speech_encoder, *foreign.padded_batch())
    assert dict(read_source(path).provenance) == {
        "num_updates": 400,
        "groups": [[0, 1], [2]],
        "target_sparsity": 0.5,
    }

    small = skill_fairseq.shrink(gated)
    kept = {field: getattr(small.config, field) for field in ("conv_channels", "heads", "ffn_dims")}
    assert max(small.config.conv_channels) < 16 and small.num_parameters() < gated.num_parameters()
    model, cfg = foreign.own_model("skill_student", **kept)
    model.speech_encoder.load_state_dict(small.state_dict())
    again = load_encoder(foreign.save_fairseq(model.eval(), cfg, tmp_path / "stage2.pt"))
    assert again.config.heads == small.config.heads and again.config.pruning_units == []
    assert same_outputs(again, small, *foreign.padded_batch())


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=says("nothing.pt", "file or folder", "WavLM")):
        load_encoder(tmp_path / "nothing.pt")
    with pytest.raises(ValueError, match=says(tmp_path, "config.json")):
        load_encoder(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        (b"<!DOCTYPE html>", "HTML"),
        (b"fLaC\0\0\0\x22", "FLAC audio"),
        (b"hello world", "b'hello wo'"),
    ],
)
def test_files_that_are_no_checkpoints(content, said, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=says(path, said)):
        load_encoder(path)


@pytest.mark.parametrize("beginning", [b" <", b" {", b"\x80\x3c", b"\x18{", b"  \x01"])
def test_the_length_that_a_safetensors_file_begins_with_is_no_kind_of_file(beginning, small, tmp_path):
    """Its bytes may be those of a page, of JSON, or blanks."""
    encoder = small.random_encoder()
    save_encoder(encoder, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    end, length = 8 + int.from_bytes(content[:8], "little"), int.from_bytes(beginning, "little")
    assert end - 8 < length
    path = tmp_path / "padded.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + content[8:end].ljust(length) + content[end:])
    assert path.read_bytes().startswith(beginning)
    again = load_encoder(path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), encoder.parameters()))


@pytest.mark.parametrize(
    ("checkpoint", "said"),
    [
        ([1, 2], ["list"]),
        ({"epoch": 1, "optimizer": {}}, ["['epoch', 'optimizer']", "Microsoft WavLM"]),
        ({"encoder.weight": torch.ones(1)}, ["state dict", "config"]),
        ({"cfg": {"lr": 1}, "model": {}}, ["['cfg', 'model']"]),
        ({"cfg": {"model": {"_name": "w2v_ctc"}}, "model": {"a.b": torch.ones(1)}}, ["'w2v_ctc'", "'a.b'"]),
        ({"cfg": {"model": {"_name": "hubert"}}, "model": [1]}, ["weights", "list"]),
    ],
)
def test_foreign_torch_files(checkpoint, said, tmp_path):
    path = tmp_path / "model.pt"
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=says(path, *said)):
        load_encoder(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer_type", "conformer"),
        ("crop_seq_to_multiple", 2),
        ("quantize_input", True),
        ("activation_fn", "swish"),
        ("extractor_mode", "batch_norm"),
        ("encoder_layers", "twelve"),
        ("conv_feature_layers", "[(512, 10, 5)] + evil()"),
    ],
)
def test_unsupported_fairseq_features_are_named(field, value, foreign, tmp_path):
    model, cfg = foreign.fairseq("wav2vec2", "base")
    cfg["model"][field] = value
    path = foreign.save_fairseq(model, cfg, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=says("model.pt", "config", field)):
        load_encoder(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("add_adapter", True),
        ("adapter_attn_dim", 16),
        ("conv_pos_batch_norm", True),
        ("layer_norm_eps", 1e-6),
        ("feat_extract_activation", "relu"),
        ("hidden_act", "gelu_new"),
        ("feat_extract_norm", "batch"),
        ("conv_stride", [5, 2]),
        ("model_type", "wav2vec2-conformer"),
    ],
)
def test_unsupported_hugging_face_features_are_named(field, value, foreign, tmp_path):
    foreign.huggingface("hubert", "base").save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, field: value}))
    theirs = {"hidden_act": "activation_fn", "feat_extract_norm": "extractor_mode"}.get(field, field)
    with pytest.raises(ValueError, match=says(tmp_path, theirs)):
        load_encoder(tmp_path)


def test_missing_left_over_and_misshapen_weights_are_listed(foreign, tmp_path):
    model, cfg = foreign.fairseq("hubert", "base")
    state = model.state_dict()
    state["encoder.layers.1.adapter.weight"] = torch.ones(1)
    del state["encoder.layers.2.fc1.bias"]
    state["layer_norm.weight"] = torch.ones(3)
    path = foreign.save_fairseq(state, cfg, tmp_path / "model.pt")
    missing = ("1 missing", "encoder.layers.2.fc1.bias")
    left_over = ("1 left over", "encoder.layers.1.adapter.weight")
    misshapen = ("shape", "layer_norm.weight", "(3,)", "(16,)")
    with pytest.raises(ValueError, match=says("model.pt", "fairseq", "'hubert'", *missing, *left_over, *misshapen)):
        load_encoder(path)


def test_damaged_hugging_face_folders(foreign, tmp_path):
    foreign.huggingface("wavlm", "base").save_pretrained(tmp_path, max_shard_size="50KB", safe_serialization=True)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    shards[1].write_bytes(shards[1].read_bytes()[:-100])
    with pytest.raises(ValueError, match=says(shards[1].name, "truncated")):
        load_encoder(tmp_path)
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=shards[1].name):
        load_encoder(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match="elsewhere"):
        load_encoder(tmp_path)
    index.unlink()
    with pytest.raises(FileNotFoundError, match=says("no weights", "model.safetensors")):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=says("config.json", "JSON")):
        load_encoder(tmp_path)


BLOCKED = ("fairseq", "hydra", "omegaconf", "scipy", "soundfile", "transformers", "sklearn")

WITHOUT = textwrap.dedent(
    """
    import sys

    class Installed:
        '''All finders but for some packages, which are not there.'''
        finders = list(sys.meta_path)

        @classmethod
        def find_spec(cls, name, path=None, target=None):
            if name.partition(".")[0] in sys.argv[1].split(","):
                return None
            specs = (finder.find_spec(name, path, target) for finder in cls.finders)
            return next((spec for spec in specs if spec is not None), None)

    sys.meta_path[:] = [Installed]
    import torch
    import skill_fairseq

    batch = torch.load(sys.argv[2])
    for path in sys.argv[3:]:
        encoder = skill_fairseq.load_encoder(path)
        with torch.no_grad():
            out = encoder(batch["source"], batch["padding"])
        assert torch.allclose(out.x, batch[path], rtol=0, atol=1e-5), path  # other threads, other rounding
    assert not set(sys.argv[1].split(",")) & set(sys.modules)
    print("same", len(sys.argv) - 3)
    """
)


@pytest.mark.slow
def test_without_fairseq_the_same_outputs(foreign, tmp_path):
    source, padding = foreign.padded_batch()
    hubert, hubert_cfg = foreign.fairseq("hubert", "base")
    student, student_cfg = foreign.own_model("skill_student", pruning_units=["conv", "heads", "ffn"])
    foreign.randomise(student)
    foreign.huggingface("wavlm", "large").save_pretrained(tmp_path / "wavlm")
    save_encoder(student.speech_encoder, tmp_path / "student.safetensors")
    paths = [
        foreign.save_fairseq(hubert, hubert_cfg, tmp_path / "hubert.pt"),
        foreign.save_fairseq(student, student_cfg, tmp_path / "student.pt"),
        tmp_path / "wavlm",
        tmp_path / "student.safetensors",
    ]
    batch = {"source": source, "padding": padding}
    with torch.no_grad():
        batch.update({str(path): load_encoder(path)(source, padding).x for path in paths})
    torch.save(batch, tmp_path / "batch.pt")
    command = [sys.executable, "-c", WITHOUT, ",".join(BLOCKED), tmp_path / "batch.pt", *paths]
    root = Path(skill_fairseq.__file__).parents[1]
    done = subprocess.run([str(c) for c in command], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "same 4"), done.stderr


def test_fields_of_fairseq_configs_that_are_unset_have_defaults():
    fields = {"encoder_layers": 3, "heads": None, "dropout": 0.1, "_name": "wavlm"}
    config = EncoderConfig.from_fairseq(fields)
    assert config == EncoderConfig(encoder_layers=3)


@pytest.mark.parametrize("file, nested", [("processor_config.json", True), ("preprocessor_config.json", False)])
def test_what_a_folder_says_of_the_audio_counts_not_its_norm(small, tmp_path, file, nested):
    from skill_fairseq.exporting.huggingface_folder import save_huggingface

    save_huggingface(small.random_encoder(), tmp_path / "folder")
    (tmp_path / "folder" / "preprocessor_config.json").unlink()
    for said in (True, False):
        extractor = {"do_normalize": said, "sampling_rate": 16000}
        (tmp_path / "folder" / file).write_text(json.dumps({"feature_extractor": extractor} if nested else extractor))
        assert load_encoder(tmp_path / "folder").normalize is said
