"""Manifests, audio files, and the speech that comes with the repository."""

from __future__ import annotations

import csv
import io
import math
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from messages import says

from skill_fairseq.audio.manifest import (
    check_manifest,
    load_audio,
    open_audio,
    read_manifest,
    readable,
    write_manifest,
)

DATA = Path(__file__).resolve().parents[2] / "examples" / "tiny" / "data"


def tone(samples: int, rate: int = 16000) -> np.ndarray:
    return (0.5 * np.sin(2 * math.pi * 440 * np.arange(samples) / rate)).astype(np.float32)


def test_round_trip(tmp_path: Path) -> None:
    write_manifest(tmp_path / "train.tsv", "/speech", ["a.flac", "b c/d.wav"], [400, 16000])
    assert (tmp_path / "train.tsv").read_text() == "/speech\na.flac\t400\nb c/d.wav\t16000\n"
    manifest = read_manifest(tmp_path / "train.tsv")
    assert (manifest.paths, manifest.sizes, len(manifest)) == (["a.flac", "b c/d.wav"], [400, 16000], 2)
    assert list(manifest.files) == [Path("/speech/a.flac"), Path("/speech/b c/d.wav")]
    assert manifest.files[-1] == Path("/speech/b c/d.wav") and list(manifest.files[:1]) == [Path("/speech/a.flac")]


@pytest.mark.parametrize("root", [".", "../..", "sub"])
def test_relative_root_is_relative_to_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str) -> None:
    folder = tmp_path / "tasks" / "digit"
    write_manifest(folder / "test.tsv", root, ["a.flac"], [400])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert read_manifest(Path("..", "tasks", "digit", "test.tsv")).root == (folder / root).resolve()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ["no audio"]),
        ("/root\n", ["no audio"]),
        ("a.flac\t400\n", ["line 1", "root"]),
        ("/root\na.flac\t400\nb.flac 400\n", ["line 3", "'b.flac 400'"]),
        ("/root\na.flac\t-5\n", ["line 2", "samples", "above 0"]),
        ("/root\na.flac\t0\n", ["line 2"]),
        ("/root\n\t400\n", ["line 2"]),
        ("/root\na.flac\t400\tgeorge\n", ["line 2"]),
        ("/root\n a.flac\t400\n", ["line 2", "' a.flac'", "blank", "rename"]),
        ("/root\n\u3000a.flac\t400\n", ["line 2", "blank"]),
        ("/root \na.flac\t400\n", ["line 1", "'/root '", "blank"]),
        ("/root\na.flac\t9999999999999999\n", ["line 2"]),
    ],
)
def test_malformed_manifest(tmp_path: Path, text: str, said: list) -> None:
    (tmp_path / "train.tsv").write_text(text)
    with pytest.raises(ValueError, match=says(tmp_path / "train.tsv", *said)):
        read_manifest(tmp_path / "train.tsv")


def test_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="skill-manifest"):
        read_manifest(tmp_path / "train.tsv")


def test_missing_files_are_counted_and_named(tmp_path: Path) -> None:
    (tmp_path / "there.flac").touch()
    names = ["gone0.flac", "there.flac", "gone1.flac", "gone2.flac", "gone3.flac"]
    write_manifest(tmp_path / "train.tsv", ".", names, [400] * 5)
    with pytest.raises(FileNotFoundError, match=says("4 of 5", "missing")) as caught:
        check_manifest(read_manifest(tmp_path / "train.tsv"))
    assert all(name in str(caught.value) for name in ("gone0", "gone1", "gone2"))
    assert "gone3" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=says("1 of 2", 5)):
        check_manifest(read_manifest(tmp_path / "train.tsv"), [1, 4])
    check_manifest(read_manifest(tmp_path / "train.tsv"), [1])
    write_manifest(tmp_path / "train.tsv", ".", ["there.flac"], [400])
    check_manifest(read_manifest(tmp_path / "train.tsv"))


@pytest.mark.parametrize(
    "name", ["a\tb.flac", "a\nb.flac", "a\x85b.flac", "", " a.flac", "\u00a0a.flac", "\udce9.flac"]
)
def test_unstorable_path_writes_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=says("rename", "file")):
        write_manifest(tmp_path / "train.tsv", ".", ["good.flac", name], [400, 400])
    with pytest.raises(ValueError, match=says("1 paths", "2 sizes")):
        write_manifest(tmp_path / "train.tsv", ".", ["good.flac"], [400, 400])
    for root in (f"/data/{name}", f"{tmp_path} ") if name not in ("", " a.flac", "\u00a0a.flac") else (f"{name} ",):
        with pytest.raises(ValueError, match=says("root", "rename", "folder")):
            write_manifest(tmp_path / "train.tsv", root, ["good.flac"], [400])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["\ufeff/root\na.flac\t400\n", "/root\r\na.flac\t400\r\n", "/root\na.flac\t400"])
def test_manifests_of_other_systems_and_tools(tmp_path: Path, content: str) -> None:
    (tmp_path / "train.tsv").write_bytes(content.encode())
    manifest = read_manifest(tmp_path / "train.tsv")
    assert (manifest.root, manifest.paths, manifest.sizes) == (Path("/root"), ["a.flac"], [400])


@pytest.mark.parametrize("ending", ["flac", "wav"])
def test_load_audio_gives_the_samples(tmp_path: Path, ending: str) -> None:
    integers = np.array([0, 1, -1, 32767, -32768] * 100, dtype=np.int16)
    soundfile.write(tmp_path / f"a.{ending}", integers, 16000, subtype="PCM_16")
    wave = load_audio(tmp_path / f"a.{ending}")
    assert wave.dtype == torch.float32 and wave.shape == (500,)
    np.testing.assert_array_equal(wave.numpy() * 32768, integers)


@pytest.mark.parametrize(
    ("samples", "rate", "said"),
    [
        (tone(8000), 8000, ["sample rate", "8000 Hz", "16000 Hz", "ffmpeg", "-ar 16000"]),
        (np.stack([tone(8000)] * 2, axis=1), 16000, ["2 channels", "mono", "ffmpeg"]),
        (tone(399), 16000, ["399 samples", 400, "0.025 s"]),
        (
            np.r_[tone(500), np.nan, np.inf].astype(np.float32),
            16000,
            ["2 samples", "NaN", 500],
        ),
    ],
)
def test_load_audio_names_what_is_wrong(tmp_path: Path, samples: np.ndarray, rate: int, said: list) -> None:
    file = tmp_path / "bad.wav"
    soundfile.write(file, samples, rate, subtype="FLOAT")
    with pytest.raises(ValueError, match=says(file, *said)):
        load_audio(file)


def test_load_audio_of_no_audio(tmp_path: Path) -> None:
    (tmp_path / "text.flac").write_text("no audio at all")
    with pytest.raises(ValueError, match=says("text.flac", "decoded")):
        load_audio(tmp_path / "text.flac")
    with pytest.raises(FileNotFoundError, match=says("gone.flac", "audio file")):
        load_audio(tmp_path / "gone.flac")


def test_min_samples_is_inclusive(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", tone(400), 16000)
    assert len(load_audio(tmp_path / "a.flac")) == 400
    with pytest.raises(ValueError, match=says("400 samples", 401)):
        load_audio(tmp_path / "a.flac", min_samples=401)


FLAC = sorted(DATA.glob("audio/**/*.flac"))[0].read_bytes()


def flac(samples: int) -> bytes:
    """The same audio with another number of samples in its header; 0: unknown."""
    header = bytearray(FLAC)
    header[18:26] = (int.from_bytes(FLAC[18:26], "big") >> 36 << 36 | samples).to_bytes(8, "big")
    return bytes(header)


def damaged() -> dict[str, tuple[bytes, list]]:
    """Files by name, and the expected message."""
    ogg, mp3 = io.BytesIO(), io.BytesIO()
    wave = np.concatenate([soundfile.read(io.BytesIO(FLAC), dtype="float32")[0]] * 3)
    soundfile.write(ogg, wave, 16000, format="OGG", subtype="VORBIS")
    files = {
        "unknown.flac": (flac(0), ["no length", "ffmpeg"]),
        "gigabytes.flac": (flac(1 << 35), ["34359738368 samples", "4 hours"]),
        "twice.flac": (flac(2 * soundfile.info(io.BytesIO(FLAC)).frames), ["decoded"]),
        "half.flac": (FLAC[: len(FLAC) // 2], ["decoded"]),
        "start.ogg": (ogg.getvalue()[:3000], ["decoded"]),
        "numbers.raw": (bytes(32000), ["decoded", "samplerate"]),
        "empty.wav": (b"", ["decoded"]),
    }
    if "MP3" in soundfile.available_formats():
        soundfile.write(mp3, wave, 16000, format="MP3", bitrate_mode="VARIABLE", compression_level=0.5)
        data = mp3.getvalue()
        second = data.index(data[:2], data.index(b"Xing"))  # the frame after the one with the length
        files["half.mp3"] = (data[: len(data) // 2], [f"{len(wave)} samples"])
        files["no_header.mp3"] = (data[second:], ["more than", "variable bit rate", "ffmpeg"])
    return files


@pytest.mark.parametrize("name", damaged())
def test_damaged_audio_is_a_value_error_that_names_it_and_costs_no_memory(tmp_path: Path, name: str) -> None:
    content, said = damaged()[name]
    (tmp_path / name).write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ValueError, match=says(tmp_path / name, *said)):
        load_audio(tmp_path / name)
    peak = tracemalloc.get_traced_memory()[1]  # numpy's arrays are traced too
    tracemalloc.stop()
    assert peak < 40_000_000


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "folder.wav").mkdir()
    for name in ("pipe.wav", "folder.wav"):
        for read in (load_audio, lambda path: open_audio(path).__enter__()):
            with pytest.raises(FileNotFoundError, match=says(name, "regular file")):
                read(tmp_path / name)


def test_recordings_longer_than_a_block_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skill_fairseq.audio.manifest.BLOCK", 1000)
    soundfile.write(tmp_path / "a.wav", tone(2500), 16000, subtype="FLOAT")
    np.testing.assert_array_equal(load_audio(tmp_path / "a.wav").numpy(), tone(2500))


def test_readable_recordings_are_given_and_others_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["a.flac", "broken.flac", "b.flac", "gone.flac"]
    for name in ("a.flac", "b.flac"):
        soundfile.write(tmp_path / name, tone(400), 16000)
    (tmp_path / "broken.flac").write_bytes(flac(0))
    skipped: list[Path] = []
    found = list(readable([tmp_path / name for name in names], skipped))
    assert [(file.name, len(wave)) for file, wave in found] == [("a.flac", 400), ("b.flac", 400)]
    assert skipped == [tmp_path / "broken.flac", tmp_path / "gone.flac"]
    assert [str(file) in record.message for file, record in zip(skipped, caplog.records)] == [True, True]
    with pytest.raises(ValueError, match=says("none", "1 recordings", "broken.flac", "no length")):
        list(readable([tmp_path / "broken.flac"], []))


def rows(path: Path) -> list:
    with open(path, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def test_example_speech_is_as_its_manifests_say() -> None:
    files = set()
    manifests = [DATA / f"{split}.tsv" for split in ("train", "valid", "test")]
    for path in [*manifests, *DATA.glob("tasks/*/t*[nt].tsv"), *DATA.glob("tasks/*/valid.tsv")]:
        manifest = read_manifest(path)
        check_manifest(manifest)
        assert manifest.root == DATA
        files.update(zip(manifest.files, manifest.sizes))
    assert {file for file, _ in files} == set(DATA.glob("audio/**/*.flac"))
    for file, size in files:
        info = soundfile.info(str(file))
        assert (info.samplerate, info.channels, info.frames) == (16000, 1, size)
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) <= 8_000_000


def test_nothing_tested_on_is_trained_on() -> None:
    unlabelled = {split: set(read_manifest(DATA / f"{split}.tsv").paths) for split in ("train", "valid", "test")}
    assert not unlabelled["train"] & unlabelled["valid"] and not unlabelled["test"] & unlabelled["valid"]
    for task in ("digit", "speaker"):
        parts = {split: set(read_manifest(DATA / "tasks" / task / f"{split}.tsv").paths) for split in unlabelled}
        assert len(set.union(*parts.values())) == sum(map(len, parts.values()))
        assert not parts["test"] & (unlabelled["train"] | unlabelled["valid"])
    speakers = {
        split: {row["speaker"] for row in rows(DATA / "tasks" / "digit" / f"{split}.labels.tsv")}
        for split in unlabelled
    }
    assert speakers["test"] == {"fsdd-theo", "fsdd-yweweler"}
    assert speakers["train"] == speakers["valid"] and len(speakers["train"]) == 4
