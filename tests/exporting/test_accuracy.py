"""The accuracy of an export: by hand, on real speech from the command, in the card and in JSON."""

from __future__ import annotations

import json

import pytest
import torch
from messages import says

from skill_fairseq.audio.manifest import read_manifest
from skill_fairseq.checkpoints import load_encoder, save_encoder
from skill_fairseq.cli.export import main
from skill_fairseq.exporting.accuracy import compare, rounded, run_encoder, sources
from skill_fairseq.exporting.traceable import NEEDED_TORCH

OLD_TORCH = tuple(int(number) for number in torch.__version__.split("+")[0].split(".")[:2]) < NEEDED_TORCH


@pytest.fixture(scope="module")
def data(small, tmp_path_factory):
    """A folder with valid.tsv: six recordings of 0.3 to 0.8 s."""
    return small.write_speech(tmp_path_factory.mktemp("data"), {"valid": [0.3, 0.4, 0.5, 0.6, 0.7, 0.8]})


def test_numbers_are_those_of_a_hand(small):
    one = {"x": torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])}
    other = {"x": torch.tensor([[[3.0, 3.0], [1.0, 2.0]]])}
    found = compare(lambda source: one, lambda source: other, [torch.zeros(1, 400)] * 2)
    assert found.relative_l1["x"] == pytest.approx(2 / 9)
    assert found.cosine["x"] == pytest.approx((21 / (5 * 18**0.5) + 4 / (2 * 5**0.5)) / 2)
    assert (found.recordings, found.num_frames, found.worst()) == (2, 4, ("x", pytest.approx(2 / 9)))
    assert found.rows()[1] == ["x", "22.222 %", "0.942188"]
    with pytest.raises(ValueError, match=says("x", "NaN")):
        compare(lambda source: one, lambda source: {"x": one["x"] / 0}, [torch.zeros(1, 400)])
    with pytest.raises(ValueError, match=says("no audio")):
        compare(lambda source: one, lambda source: one, [])


def test_sources_are_cut_and_filled_to_a_fixed_length(small, data):
    encoder = small.random_encoder(normalize=True)
    manifest = read_manifest(data / "valid.tsv")
    whole = list(sources(manifest, encoder, 100.0))
    assert sorted(wave.size(1) for wave in whole) == sorted(manifest.sizes)
    assert all(abs(float(wave.mean())) < 1e-4 and float(wave.std()) == pytest.approx(1, abs=0.01) for wave in whole)
    pieces = list(sources(manifest, encoder, 100.0, samples=4000))
    assert {tuple(piece.shape) for piece in pieces} == {(1, 4000)}
    assert len(pieces) == sum(-(-size // 4000) for size in manifest.sizes)
    assert torch.equal(pieces[0][0], whole[0][0, :4000])


def test_the_command_measures_prints_and_keeps(small, teacher_file, data, tmp_path, capsys):
    out = tmp_path / "student"
    arguments = [str(teacher_file), str(out), "--to", "s3prl", "--dtype", "bfloat16", "--accuracy"]
    assert main([*arguments, str(data / "valid.tsv"), "--limit", "0.0001"]) == 0
    said = capsys.readouterr()
    found = json.loads((out / "accuracy.json").read_text())
    assert found["recordings"] == 6 and 0.0001 < found["relative_l1"]["hidden_state_3"] < 0.02
    row = f"{100 * found['relative_l1']['x']:.3f} %"
    assert row in said.out and row in (out / "README.md").read_text() and "6 recordings" in said.out
    assert said.err.count("warning: ") == 1 and "--limit" in said.err
    encoder = load_encoder(teacher_file)
    again = load_encoder(out)
    names = list(found["relative_l1"])
    audio = list(sources(read_manifest(data / "valid.tsv"), encoder, 120.0))
    measured = compare(run_encoder(encoder, names), run_encoder(again, names), audio)  # what the folder itself gives
    assert measured.relative_l1 == pytest.approx(found["relative_l1"], rel=1e-6)


def test_a_file_that_keeps_every_bit_is_without_error(small, teacher_file, data, tmp_path, capsys):
    out = tmp_path / "student.safetensors"
    assert main([str(teacher_file), str(out), "--accuracy", str(data / "valid.tsv")]) == 0
    found = json.loads((tmp_path / "student.accuracy.json").read_text())
    assert set(found["relative_l1"].values()) == {0.0} and "warning" not in capsys.readouterr().err
    bias = rounded(load_encoder(out), torch.bfloat16).transformer.layer_norm.bias  # with fewer bits each is rounded
    assert torch.equal(bias, bias.bfloat16().float())


def test_what_does_not_go_together(small, teacher_file, data, tmp_path, capsys):
    manifest = str(data / "valid.tsv")
    for arguments, said in (
        (["a.safetensors", "--precision", "int8"], ["--precision", "safetensors"]),
        (["a.pt2", "--layers", "1"], ["--layers", "torch"]),
        (["a.onnx", "--precision", "fp16", "--calibrate", manifest], ["--calibrate", "--precision int8"]),
        (["a.onnx", "--accuracy", "none.tsv"], ["none.tsv"]),
        (["a.safetensors", "--task", "digit"], ["--task", "--accuracy"]),
        (["a.safetensors", "--limit", "0"], ["--limit", "above 0"]),
    ):
        if OLD_TORCH and not arguments[0].endswith(".safetensors"):
            continue  # it reports that it cannot record any encoder
        assert main([str(teacher_file), str(tmp_path / arguments[0]), *arguments[1:]]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and all(part in error for part in said), error
    save_encoder(small.random_encoder(), tmp_path / "b.safetensors", {})
    for layers in () if OLD_TORCH else ("4", "1,1", "x"):
        assert main([str(tmp_path / "b.safetensors"), str(tmp_path / "b.onnx"), "--layers", layers]) == 2
        assert "--layers" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["b.safetensors"]
