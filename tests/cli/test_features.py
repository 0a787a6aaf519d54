"""skill-features writes the encoder's numbers, and fairseq's own k-means scripts read them."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from skill_fairseq.audio.features import mfcc
from skill_fairseq.audio.manifest import load_audio, read_manifest, write_manifest
from skill_fairseq.checkpoints import load_encoder
from skill_fairseq.cli.features import main
from skill_fairseq.features.shards import read_features


@pytest.fixture(scope="module")
def data(small, tmp_path_factory):
    """A folder with train.tsv: five recordings of 0.3 to 2.1 s."""
    return small.write_speech(tmp_path_factory.mktemp("data"), {"train": [0.3, 2.1, 0.5, 0.4, 0.6]})


def states(model, data, layer):
    encoder = load_encoder(model)
    with torch.no_grad():
        return [encoder(load_audio(file)[None]).hidden_states[layer][0] for file in read_manifest(data).files]


def test_layers_are_the_encoders(teacher_file, data, tmp_path, capsys):
    words = [str(teacher_file), str(data / "train.tsv"), str(tmp_path / "f")]
    assert main([*words, "--layers", "3,1", "--json"]) == 0
    printed = capsys.readouterr()
    assert "5 recordings, 190 frames of 32 features for each of layers 3, 1" in printed.err
    for layer in (1, 3):
        found = list(read_features(tmp_path / "f" / f"layer_{layer}", "train"))
        for a, b in zip(found, states(teacher_file, data / "train.tsv", layer), strict=True):
            np.testing.assert_allclose(a, b.numpy(), rtol=1e-5, atol=1e-5)
    about = json.loads(printed.out)
    assert (about["recordings"], about["frames"], about["width"], about["unreadable"]) == (5, 190, 32, [])
    assert about["settings"]["layers"] == [3, 1] and len(about["settings"]["model sha256"]) == 64
    assert all(Path(path).is_file() for path in about["files"])
    assert main([*words, "--layers", "3,1"]) == 0 and "there already" in capsys.readouterr().out
    assert main([*words, "--layers", "3,2"]) == 2 and "layers differ" in capsys.readouterr().err


def test_long_recordings_are_streamed_and_short_ones_are_whole(teacher_file, data, tmp_path):
    words = [str(teacher_file), str(data / "train.tsv")]
    options = ["--layers", "2", "--chunk-seconds", "1"]
    assert main([*words, str(tmp_path / "near"), *options, "--context-seconds", "5"]) == 0
    assert main([*words, str(tmp_path / "far"), *options, "--context-seconds", "0"]) == 0
    whole = states(teacher_file, data / "train.tsv", 2)
    for folder, same in (("near", [True] * 5), ("far", [True, False, True, True, True])):
        found = list(read_features(tmp_path / folder, "train"))
        close = [np.allclose(a, b.numpy(), rtol=1e-4, atol=1e-4) for a, b in zip(found, whole, strict=True)]
        assert close == same and [len(a) for a in found] == [len(b) for b in whole]


def test_an_ended_command_goes_on(teacher_file, data, tmp_path, capsys, monkeypatch):
    import skill_fairseq.cli.features as command

    words = [str(teacher_file), str(data / "train.tsv"), str(tmp_path / "f"), "--layers", "1"]
    assert main([*words[:2], str(tmp_path / "whole"), "--layers", "1"]) == 0
    loaded = []

    def load(file, *rest):
        loaded.append(file.name)
        if loaded == ["0.wav", "1.wav", "2.wav"]:
            raise KeyboardInterrupt
        return load_audio(file, *rest)

    monkeypatch.setattr(command, "load_audio", load)
    assert main(words) == 130
    assert not list((tmp_path / "f").glob("train*"))
    assert main(words) == 0 and "went on after 2 of 5" in capsys.readouterr().out
    assert loaded == ["0.wav", "1.wav", "2.wav", "2.wav", "3.wav", "4.wav"]
    for name in ("train_0_1.npy", "train_0_1.len"):
        assert (tmp_path / "f" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_cannot_be_read_keeps_its_line(teacher_file, data, tmp_path, capsys):
    (tmp_path / "bad.wav").write_bytes(b"RIFF nothing")
    good = str(data / "train" / "0.wav")
    write_manifest(tmp_path / "train.tsv", "/", [good[1:], str(tmp_path / "bad.wav")[1:], good[1:]], [4800] * 3)
    assert main(["mfcc", str(tmp_path / "train.tsv"), str(tmp_path / "f"), "--json"]) == 0
    said = capsys.readouterr()
    assert "1 recordings could not be read" in said.err and "bad.wav" in said.err
    found = list(read_features(tmp_path / "f", "train"))
    assert [len(a) for a in found] == [28, 0, 28]
    np.testing.assert_array_equal(found[2], mfcc(load_audio(good)).numpy())
    assert json.loads(said.out)["unreadable"] == [str(tmp_path / "bad.wav")[1:]]


@pytest.mark.formats("out", "features in .npy and .len", "fairseq's learn_kmeans.py and dump_km_label.py")
def test_fairseqs_k_means_takes_them(teacher_file, data, tmp_path, monkeypatch):
    pytest.importorskip("joblib")
    fairseq = pytest.importorskip("fairseq")
    scripts = Path(fairseq.__file__).parent / "examples" / "hubert" / "simple_kmeans"
    if not scripts.is_dir():
        pytest.skip("this fairseq was installed without its examples")
    for rank in ("0", "1"):
        words = [str(teacher_file), str(data / "train.tsv"), str(tmp_path / "f"), "--layers", "3"]
        assert main([*words, "--shards", "2", "--rank", rank]) == 0

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(scripts / script), run_name="__main__")

    run("learn_kmeans.py", tmp_path / "f", "train", 2, tmp_path / "km.bin", 4, "--percent", "-1", "--n_init", "1")
    lines = []
    for rank in (0, 1):
        run("dump_km_label.py", tmp_path / "f", "train", tmp_path / "km.bin", 2, rank, tmp_path / "labels")
        lines += (tmp_path / "labels" / f"train_{rank}_2.km").read_text().splitlines()
    frames = [len(state) for state in states(teacher_file, data / "train.tsv", 3)]
    assert [len(line.split()) for line in lines] == frames
    assert len({unit for line in lines for unit in line.split()}) > 1


def test_errors_are_one_line(teacher_file, data, tmp_path, capsys):
    manifest = str(data / "train.tsv")
    for words, said in (
        ([str(teacher_file), manifest], ["--layers", "0 to 3"]),
        ([str(teacher_file), manifest, "--layers", "4"], ["--layers", "4"]),
        (["mfcc", manifest, "--layers", "1"], ["--layers", "mfcc"]),
        (["mfcc", manifest, "--shards", "9"], ["shards", "at most 5"]),
        (["mfcc", manifest, "--shards", "2", "--rank", "2"], ["rank", "0 to 1"]),
        (["nothing.pt", manifest, "--layers", "1"], ["nothing.pt"]),
        (["mfcc", "nothing.tsv"], ["nothing.tsv"]),
    ):
        assert main([*words[:2], str(tmp_path / "f"), *words[2:]]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and all(part in error for part in said), error
    assert not list(tmp_path.iterdir())
