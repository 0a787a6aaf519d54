"""The command skill-export."""

from __future__ import annotations

import json
import pathlib
import re

import pytest
import torch
from messages import says

from skill_fairseq.checkpoints import load_encoder, save_encoder
from skill_fairseq.checkpoints.load import read_source
from skill_fairseq.cli.export import main
from skill_fairseq.cli.info import main as info
from skill_fairseq.files import sha256
from skill_fairseq.modules.config import hubert_base
from skill_fairseq.modules.encoder import SpeechEncoder


@pytest.fixture
def config():
    return hubert_base(
        conv_feature_layers="[(8,10,5)] + [(8,3,2)] * 4 + [(8,2,2)] * 2",
        encoder_layers=2,
        encoder_embed_dim=16,
        encoder_ffn_embed_dim=24,
        encoder_attention_heads=2,
        conv_pos=8,
        conv_pos_groups=2,
    )


def checkpoint(config, path, **extra):
    """A fairseq checkpoint of this package from training, with optimizer state."""
    encoder = SpeechEncoder(config)
    state = {f"speech_encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    state["mask_emb"] = torch.ones(16)
    model = {"_name": "skill_student", **config.to_dict()}
    cfg = {"model": model, "task": {"teacher": "/far/away/teacher.pt"}}
    optimizer = {"state": {0: {"exp_avg": torch.ones(100_000)}}}
    history = [{"num_updates": 7}]
    everything = {"cfg": cfg, "model": state, "last_optimizer_state": optimizer, "optimizer_history": history}
    torch.save({**everything, **extra}, path)
    return encoder.eval()


def test_writes_the_encoder_and_says_its_size(config, tmp_path, capsys):
    encoder = checkpoint(config, tmp_path / "checkpoint_last.pt")
    out = tmp_path / "new folder" / "student.safetensors"
    assert main([str(tmp_path / "checkpoint_last.pt"), str(out)]) == 0
    said = capsys.readouterr().out
    assert f"{encoder.num_parameters():,} parameters in float32" in said
    assert f"{out.stat().st_size / 1e6:.2f} MB" in said and "gates" not in said
    assert out.stat().st_size < 4 * encoder.num_parameters() + 20_000  # no optimizer in it
    source = torch.randn(2, 4000)
    assert torch.equal(load_encoder(out)(source).x, encoder(source).x)
    provenance = read_source(out).provenance
    assert provenance["source"] == "checkpoint_last.pt" and provenance["num_updates"] == 7
    assert provenance["source_sha256"] == sha256(tmp_path / "checkpoint_last.pt")
    assert b"/far/away" not in out.read_bytes() and str(tmp_path).encode() not in out.read_bytes()


def test_an_exported_file_is_exported_again_with_its_provenance(config, tmp_path, capsys):
    checkpoint(config, tmp_path / "a.pt")
    assert main([str(tmp_path / "a.pt"), str(tmp_path / "a.safetensors")]) == 0
    again = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    assert main([*again, "--dtype", "float16"]) == 0
    first, second = read_source(tmp_path / "a.safetensors"), read_source(tmp_path / "b.safetensors")
    assert first.provenance == second.provenance and first.config == second.config
    name = "transformer.layers.1.ffn.fc1.weight"
    assert second.state[name].dtype == torch.float16
    assert torch.equal(first.state[name].half(), second.state[name])


def test_gates_go_along_and_are_mentioned(config, tmp_path, capsys):
    checkpoint(config.replace(pruning_units=["ffn"]), tmp_path / "a.pt")
    assert main([str(tmp_path / "a.pt"), str(tmp_path / "a.safetensors")]) == 0
    assert re.search(says("gates", "ffn", "skill-shrink"), capsys.readouterr().out)
    assert len(list(load_encoder(tmp_path / "a.safetensors").named_gates())) == 2


def test_the_ending_says_what_is_written(config, tmp_path, capsys, monkeypatch):
    checkpoint(config, tmp_path / "a.pt")
    written = []
    for check in ("check_torch", "require"):  # nothing is recorded here
        monkeypatch.setattr(f"skill_fairseq.cli._export_options.{check}", lambda *of: None)
    monkeypatch.setattr(
        "skill_fairseq.cli.export._write_onnx", lambda args, *rest: (written.append(args.out) or "a graph", None)
    )
    monkeypatch.setattr(
        "skill_fairseq.cli.export.save_torch_program", lambda encoder, path, *rest: written.append(path)
    )
    for name in ("a.onnx", "a.pt2", "a.safetensors"):
        assert main([str(tmp_path / "a.pt"), str(tmp_path / name)]) == 0
    assert [path.name for path in written] == ["a.onnx", "a.pt2"] and (tmp_path / "a.safetensors").is_file()
    capsys.readouterr()
    assert main([str(tmp_path / "a.pt"), str(tmp_path / "folder")]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in ("OUT", "folder", ".safetensors, .onnx, .xml, .pt2", "--to huggingface"))


def test_info(config, tmp_path, capsys):
    small = config.replace(heads=[[1], None], ffn_dims=[3, 0], original_parameters=99_999)
    encoder = SpeechEncoder(small)
    save_encoder(encoder, tmp_path / "a.safetensors", {"source": "stage2.pt"}, "bfloat16")
    assert info([str(tmp_path / "a.safetensors")]) == 0
    said = capsys.readouterr().out
    assert main(["--info", str(tmp_path / "a.safetensors")]) == 0 and capsys.readouterr().out == said  # its older name
    lines = dict(line.split(None, 1) for line in said.splitlines())
    assert lines["format"].endswith("bfloat16")
    assert lines["parameters"] == f"{encoder.num_parameters():,} of 99,999 before pruning"
    assert lines["heads"] == "1 -" and lines["FFN"] == "units     3 0"
    assert lines["channels"] == "8 8 8 8 8 8 8"
    assert json.loads(lines["provenance"]) == {"source": "stage2.pt"}
    assert info([str(tmp_path / "a.safetensors"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["types"] == ["bfloat16"] and found["shape"]["ffn_dims"] == [3, 0]
    assert (found["parameters"], found["original_parameters"]) == (encoder.num_parameters(), 99_999)
    assert found["sparsity"] == pytest.approx(1 - encoder.num_parameters() / 99_999)
    assert found["macs_per_second"] == encoder.macs(1.0) and found["provenance"] == {"source": "stage2.pt"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_info_of_gates_and_of_the_encoder_before_pruning(config, tmp_path, capsys):
    encoder = checkpoint(config.replace(pruning_units=["heads", "ffn"]), tmp_path / "a.pt")
    assert info([str(tmp_path / "a.pt"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gates"] == ["heads", "ffn"] and found["parameters"] == encoder.num_parameters()
    assert found["sparsity"] is None and found["original_parameters"] is None
    assert info([str(tmp_path / "a.pt")]) == 0
    assert "sparsity" not in capsys.readouterr().out


def test_errors_are_one_line_and_leave_nothing(config, tmp_path, capsys):
    checkpoint(config, tmp_path / "odd.pt", extra_state=pathlib.PurePosixPath("x"))
    for arguments, said in (
        (["nothing.pt", "a.safetensors"], ["nothing.pt"]),
        (["odd.pt", "a.pt"], ["a.pt", ".safetensors"]),
        (["odd.pt", "a.safetensors"], ["odd.pt", "--trust"]),
    ):
        paths = [word if word.startswith("--") else str(tmp_path / word) for word in arguments]
        assert main(paths) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("error: ") and all(part in error for part in said)
    assert [entry.name for entry in tmp_path.iterdir()] == ["odd.pt"]
    assert main([str(tmp_path / "odd.pt"), str(tmp_path / "a.safetensors"), "--trust"]) == 0
    for arguments in ([], [str(tmp_path / "odd.pt")]):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "see skill-export --help" in error


def test_foreign_files_that_look_like_ours_are_one_line(tmp_path, capsys):
    import zipfile

    with zipfile.ZipFile(tmp_path / "x.pt2", "w") as archive:
        archive.writestr("x/extra/skill_fairseq.json", "{}")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_bytes('{"model_type": "hubert"}'.encode("utf-16"))
    for path, said in ((tmp_path / "x.pt2", "x.pt2"), (tmp_path / "folder", "config.json")):
        assert info([str(path)]) == 2
        assert said in capsys.readouterr().err
