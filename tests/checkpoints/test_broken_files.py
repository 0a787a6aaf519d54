"""Broken, foreign or oversized files: one error that names the file, without allocating memory that it claims."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from messages import says
from safetensors.torch import load_file, save, save_file

from skill_fairseq.checkpoints import load_encoder, save_encoder
from skill_fairseq.checkpoints.load import read_source
from skill_fairseq.checkpoints.source import _ASSIGNS, _storage
from skill_fairseq.cli.info import main as skill_info
from skill_fairseq.exporting.huggingface_folder import save_huggingface
from skill_fairseq.exporting.s3prl_folder import save_s3prl
from skill_fairseq.modules.config import EncoderConfig

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 378342945\n"
METADATA = {"format": "skill_fairseq.encoder", "format_version": "1", "provenance": "{}"}


def info_error(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The line that skill-info prints for a file."""
    assert skill_info([str(path)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("error: ")
    return said.err


@pytest.mark.parametrize("content, said", [(LFS, "git lfs pull"), (b"\n<!DOCTYPE html>", "HTML"), (b"", "empty")])
@pytest.mark.parametrize(
    "file", ["config.json", "model.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json"]
)
def test_pointers_and_pages_in_a_folder_are_recognised(small, tmp_path, capsys, file, content, said):
    save_huggingface(small.random_encoder(), tmp_path / "a")
    if file != "config.json":
        (tmp_path / "a" / "model.safetensors").unlink()
    (tmp_path / "a" / file).write_bytes(content)
    error = info_error(tmp_path / "a", capsys)
    assert re.search(says(file, said), error)


@pytest.mark.parametrize("save_folder", [save_huggingface, save_s3prl])
def test_pointers_in_folders_of_our_own_are_recognised(small, tmp_path, capsys, save_folder):
    save_folder(small.random_encoder(ffn_dims=[3, None, 48]), tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").write_bytes(LFS)
    assert re.search(says("model.safetensors", "Git LFS"), info_error(tmp_path / "a", capsys))


@pytest.mark.parametrize("index", [{"weight_map": []}, {}, {"weight_map": {"a": 1}}, {"weight_map": None}])
def test_an_index_without_a_map_is_named(small, tmp_path, capsys, index):
    save_huggingface(small.random_encoder(), tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").unlink()
    (tmp_path / "a" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert re.search(says("model.safetensors.index.json", "weight_map"), info_error(tmp_path / "a", capsys))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"model_type": "hubert", "hidden_size": Infinity}',
        '{"model_type": "hubert", "hidden_size": 1e999}',
        '{"model_type": "hubert", "conv_dim": 5}',
        '{"model_type": "hubert", "conv_dim": [1e999], "conv_kernel": [1], "conv_stride": [1]}',
        '{"model_type": "hubert", "num_hidden_layers": "two"}',
        '{"model_type": "hubert", "hidden_act": {"a": []}}',
        '{"model_type": ["hubert"]}',
        '{"model_type": "skill_student"}',
        '{"model_type": "skill_student", "encoder_shape": [1]}',
        '{"model_type": "skill_student", "encoder_shape": {"encoder_layers": 3, "heads": [["x"]]}}',
        "null",
        '"' + "x" * 5_000_000 + '"',
    ],
    ids=lambda text: text[:60],
)
def test_configs_of_any_content_end_in_one_line(small, tmp_path, capsys, text):
    save_huggingface(small.random_encoder(), tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text(text)
    assert "config.json" in info_error(tmp_path / "a", capsys)


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize("text", ["[]", '{"feature_extractor": 3}', '{"sampling_rate": "x", "do_normalize": 0}'])
def test_what_is_said_of_the_audio_may_be_anything(small, tmp_path, capsys, file, text):
    save_huggingface(small.random_encoder(), tmp_path / "a")
    (tmp_path / "a" / file).write_text(text)
    if skill_info([str(tmp_path / "a")]):  # in the other file these fields mean nothing
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and str(tmp_path / "a") in error


TOO_LARGE = [
    {"encoder_layers": 100_000},
    {"encoder_attention_heads": 10**9, "encoder_embed_dim": 10**9, "conv_pos_groups": 1},
    {"encoder_embed_dim": 100_000, "encoder_attention_heads": 5, "conv_pos_groups": 1},
    {"encoder_ffn_embed_dim": 10**15},
    {"num_buckets": 10**15, "relative_position": True},
    {"pos_conv_depth": 10**6},
    {"conv_pos": 10**15},
    {"conv_feature_layers": "[(1000000000,10,5)] * 7"},
    {"conv_feature_layers": "[(512,10,5)]" + " " * 100_000},
    {"conv_feature_layers": [[8, 2, 2]] * 100_000},
]

LOAD_ALL = """
import resource, sys, time, torch
from skill_fairseq import load_encoder

began = time.process_time()
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (1 << 30),) * 2)
for path in sys.argv[1:]:
    try:
        load_encoder(path)
    except ValueError as error:
        print(error)
print(time.process_time() - began)
"""


def test_no_memory_is_taken_for_what_a_config_asks_and_the_file_does_not_hold(tmp_path):
    paths = [tmp_path / f"{i}.safetensors" for i in range(len(TOO_LARGE))]
    for path, fields in zip(paths, TOO_LARGE):
        path.write_bytes(save({"x": torch.ones(1)}, {**METADATA, "config": json.dumps(fields)}))
    done = subprocess.run([sys.executable, "-c", LOAD_ALL, *map(str, paths)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *errors, seconds = done.stdout.splitlines()
    assert len(errors) == len(paths) and float(seconds) < 10
    for path, error in zip(paths, errors):
        assert error.startswith(f"{path}: ") and "its config" in error and "alloc" not in error


def test_a_foreign_identity_projection_is_not_made_larger_than_the_file(foreign, tmp_path):
    model, cfg = foreign.fairseq("hubert", "base")
    cfg["model"].update(conv_feature_layers="[(100000,10,5)]", encoder_embed_dim=100_000, encoder_attention_heads=1)
    path = foreign.save_fairseq({"layer_norm.weight": torch.ones(10)}, cfg, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=says("a.pt", "config", 10)):
        load_encoder(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(small, tmp_path, value):
    encoder = small.random_encoder()
    save_encoder(encoder, tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    name = "transformer.layers.2.ffn.fc1.weight"
    tensors[name][0, 0] = value
    metadata = {**METADATA, "config": json.dumps(encoder.config.to_dict())}
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    with pytest.raises(ValueError, match=says("a.safetensors", "NaN", name)):
        load_encoder(tmp_path / "a.safetensors")


def test_a_head_may_hold_anything(foreign, tmp_path):
    model, cfg = foreign.fairseq("hubert", "base")
    state = {**model.state_dict(), "final_proj.weight": torch.full((2, 2), float("nan"))}
    load_encoder(foreign.save_fairseq(state, cfg, tmp_path / "a.pt"))


def test_heads_that_the_encoder_does_not_need_are_named_and_left_out(small, tmp_path, caplog, capsys):
    encoder = small.random_encoder(relative_position=False)
    save_huggingface(encoder, tmp_path / "a")
    state = load_file(tmp_path / "a" / "model.safetensors")
    heads = {"final_proj.weight": torch.randn(16, 32), "final_proj.bias": torch.randn(16)}
    save_file({**state, **heads}, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    caplog.set_level(logging.INFO)
    found = load_encoder(tmp_path / "a")
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), encoder.state_dict().values()))
    assert "ignored" in caplog.text and "final_proj.bias, final_proj.weight" in caplog.text
    assert skill_info([str(tmp_path / "a"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["left_out"] == ["final_proj.bias", "final_proj.weight"]
    adapter = {"encoder.layers.0.adapter.weight": torch.ones(2)}  # this one would change the encoder's results
    save_file({**state, **adapter}, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=says("1 left over", "encoder.layers.0.adapter.weight")):
        load_encoder(tmp_path / "a")


def test_what_a_folder_does_not_say_is_said_to_be_assumed(small, tmp_path, caplog, capsys):
    save_huggingface(small.random_encoder(), tmp_path / "a")
    load_encoder(tmp_path / "a")
    assert "assumed" not in caplog.text
    (tmp_path / "a" / "preprocessor_config.json").unlink()
    load_encoder(tmp_path / "a")
    assert "16000 Hz" in caplog.text and "preprocessor_config.json" in caplog.text
    assert skill_info([str(tmp_path / "a")]) == 0
    assert "assumed       waveforms at 16000 Hz" in capsys.readouterr().out


def test_graphs_whose_description_is_broken_are_one_line(tmp_path, capsys):
    for text in ("[1]", "{", '{"config": 3, "provenance": {}}', '{"config": {}, "provenance": 3}', "[" * 100_000):
        with zipfile.ZipFile(tmp_path / "a.pt2", "w") as archive:
            archive.writestr("a/extra/skill_fairseq.json", text)
        assert "a.pt2: " in info_error(tmp_path / "a.pt2", capsys)
    with zipfile.ZipFile(tmp_path / "a.pt2", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/extra/skill_fairseq.json", "x" * 50_000_000)
    assert "a.pt2: " in info_error(tmp_path / "a.pt2", capsys)
    (tmp_path / "a.onnx").write_bytes(b"\x08\x08" + bytes(range(256)))
    assert "a.onnx: " in info_error(tmp_path / "a.onnx", capsys)


@pytest.mark.parametrize("provenance", ["[1]", "3", '{"a": NaN}', "{"])
def test_the_origin_of_a_file_is_named_fields(small, tmp_path, provenance):
    encoder = small.random_encoder()
    metadata = {**METADATA, "provenance": provenance, "config": json.dumps(encoder.config.to_dict())}
    (tmp_path / "a.safetensors").write_bytes(save(encoder.state_dict(), metadata))
    with pytest.raises(ValueError, match=says("a.safetensors", "provenance")):
        load_encoder(tmp_path / "a.safetensors")


def test_a_loaded_encoder_owns_its_weights(small, tmp_path):
    """Tensors that share memory in a file, as in a flattened model, are separate and trainable in the encoder."""
    encoder = small.random_encoder()
    state = {f"speech_encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    flat = torch.cat([tensor.flatten() for tensor in state.values()])
    parts = flat.split([tensor.numel() for tensor in state.values()])
    state = {name: part.view_as(tensor) for (name, tensor), part in zip(state.items(), parts)}
    bias = "speech_encoder.transformer.layers.{}.ffn.fc1.bias"
    state[bias.format(1)] = state[bias.format(0)]
    cfg = {"model": {"_name": "skill_student", **encoder.config.to_dict()}, "task": {"normalize": False}}
    torch.save({"model": state, "cfg": cfg}, tmp_path / "a.pt")
    found = load_encoder(tmp_path / "a.pt")
    storages = {parameter.data_ptr() for parameter in found.parameters()}
    assert len(storages) == len(list(found.parameters())) and all(p.requires_grad for p in found.parameters())
    assert all(_storage(parameter).nbytes() == 4 * parameter.numel() for parameter in found.parameters())
    with torch.no_grad():
        found.transformer.layers[0].ffn.fc1.bias.zero_()
    assert torch.equal(found.transformer.layers[1].ffn.fc1.bias, encoder.transformer.layers[0].ffn.fc1.bias)
    if _ASSIGNS:  # otherwise the encoder is initialised, then filled
        before = torch.get_rng_state()
        load_encoder(tmp_path / "a.pt")
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not _ASSIGNS, reason=f"torch {torch.__version__} cannot take tensors over")
def test_the_peak_of_a_load_is_little_more_than_the_file(small, tmp_path):
    encoder = small.random_encoder(encoder_embed_dim=512, encoder_ffn_embed_dim=8192, encoder_layers=4)
    state = {f"speech_encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    cfg = {"model": {"_name": "skill_student", **encoder.config.to_dict()}, "task": {"normalize": False}}
    torch.save({"model": state, "cfg": cfg}, tmp_path / "a.pt")
    save_encoder(encoder, tmp_path / "a.safetensors")
    save_encoder(small.random_encoder(), tmp_path / "small.safetensors")
    code = (
        "import resource, sys, skill_fairseq\n"
        "for path in sys.argv[1:]:\n"
        "    skill_fairseq.load_encoder(path)\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )
    paths = [str(tmp_path / name) for name in ("small.safetensors", "a.pt", "a.safetensors")]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True)
    before, zipped, mapped = map(int, done.stdout.split())
    size = (tmp_path / "a.pt").stat().st_size
    assert size > 150e6 and zipped - before < 1.6 * size and mapped - before < 1.6 * size


@pytest.mark.parametrize("kind", ["safetensors", "huggingface", "own"])
def test_the_sample_rate_reaches_every_file(small, tmp_path, kind, capsys):
    pruned = {"ffn_dims": [3, None, 48]} if kind == "own" else {}
    encoder = small.random_encoder(sample_rate=8000, **pruned)
    if kind == "safetensors":
        save_encoder(encoder, tmp_path / "a")
    else:
        save_huggingface(encoder, tmp_path / "a")
        assert json.loads((tmp_path / "a" / "preprocessor_config.json").read_text())["sampling_rate"] == 8000
        card = (tmp_path / "a" / "README.md").read_text()
        assert "sampling_rate=8000" in card and "16000" not in card
    assert load_encoder(tmp_path / "a").config.sample_rate == 8000
    assert skill_info([str(tmp_path / "a")]) == 0
    assert "8000 Hz" in capsys.readouterr().out
    with pytest.raises(ValueError, match=says("8000 Hz", "16000 Hz")):
        save_s3prl(encoder, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_unset_fields_and_limits_of_the_shape():
    with pytest.raises(ValueError, match=says("model.encoder_layers", 1001, 1000)):
        EncoderConfig(encoder_layers=1001)


def test_a_pipe_is_no_model(tmp_path):
    import os

    os.mkfifo(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=says("a.pt", "regular file")):
        read_source(tmp_path / "a.pt")
