"""skill-manifest, on folders of every kind of file."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from messages import says

from skill_fairseq.audio.manifest import check_manifest, load_audio, read_manifest
from skill_fairseq.cli.manifest import main

COMMAND = "from skill_fairseq.cli.manifest import main; raise SystemExit(main())"


def tone(seconds: float, rate: int = 16000) -> np.ndarray:
    return (0.5 * np.sin(2 * math.pi * 440 * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def write(file: Path, samples: np.ndarray, rate: int = 16000) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(file, samples, rate)


def many(folder: Path, count: int) -> Path:
    for index in range(count):
        write(folder / f"speaker{index % 3}" / f"{index:03d}.wav", tone(0.5))
    return folder


def splits(out: Path) -> dict[str, list[str]]:
    return {path.stem: read_manifest(path).paths for path in out.glob("*.tsv") if path.stem != "left_out"}


def left_out(out: Path) -> dict[str, str]:
    header, *rows = (out / "left_out.tsv").read_text().splitlines()
    assert header == "path\treason\tdetail"
    return {row.split("\t")[0]: row.split("\t", 1)[1] for row in rows}


def test_good_files_stay_and_bad_ones_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder, out = tmp_path / "audio", tmp_path / "out"
    write(folder / "good.flac", tone(2))
    write(folder / "deep" / "er" / "GOOD.WAV", tone(3))
    write(folder / "shortest.flac", tone(1))
    write(folder / "short.flac", tone(0.99))
    write(folder / "longest.ogg", tone(4))
    write(folder / "long.flac", tone(4.01))
    write(folder / "stereo.wav", np.stack([tone(2)] * 2, axis=1))
    write(folder / "phone.wav", tone(2, 8000), 8000)
    write(folder / "cut.flac", np.random.default_rng(0).normal(size=32000) * 0.1)
    (folder / "cut.flac").write_bytes((folder / "cut.flac").read_bytes()[:-20000])
    (folder / "text.flac").write_text("no audio")
    (folder / "empty.wav").touch()
    (folder / "notes.txt").write_text("not looked at")
    write(folder / "a\tb.flac", tone(2))

    assert main([str(folder), str(out), "--min-seconds", "1", "--max-seconds", "4", "--valid-percent", "0"]) == 1
    manifest = read_manifest(out / "train.tsv")
    check_manifest(manifest)
    assert manifest.root == folder.resolve() and (out / "train.tsv").read_text().startswith(f"{folder.resolve()}\n")
    assert dict(zip(manifest.paths, manifest.sizes)) == {
        "good.flac": 32000,
        "deep/er/GOOD.WAV": 48000,
        "shortest.flac": 16000,
        "longest.ogg": 64000,
    }
    assert all(len(load_audio(file)) == size for file, size in zip(manifest.files, manifest.sizes))

    reasons = left_out(out)
    assert set(reasons) == {
        "short.flac",
        "long.flac",
        "stereo.wav",
        "phone.wav",
        "cut.flac",
        "text.flac",
        "empty.wav",
    } | {repr("a\tb.flac")}
    for name, kind, *values in (
        ("short.flac", "too short", "0.990 s", "1 s"),
        ("long.flac", "too long", "4.010 s", "4 s"),
        ("stereo.wav", "not mono", "2 channels"),
        ("phone.wav", "other sample rate", "8000 Hz", "16000 Hz"),
        *((name, "unreadable") for name in ("cut.flac", "text.flac", "empty.wav")),
    ):
        found, reason = reasons[name].split("\t")
        assert found == kind and re.search(says(*values or [name]), reason)
    printed, warned = capsys.readouterr()
    assert re.search(says("8 files", "left out", 4), warned)
    assert "left out: 8 files" in printed and "unreadable: 3: " in printed
    assert re.search(r"other sample rate: 1: phone\.wav.*8000 Hz.*16000 Hz", printed) and "ffmpeg -i" in printed
    assert "4 recordings, 0.003 hours" in printed


def test_damage_in_the_middle_needs_decode(tmp_path: Path) -> None:
    samples = tone(2)
    samples[5000] = np.nan
    (tmp_path / "audio").mkdir()
    soundfile.write(tmp_path / "audio" / "nan.wav", samples, 16000, subtype="FLOAT")
    write(tmp_path / "audio" / "good.wav", tone(2))
    arguments = [str(tmp_path / "audio"), str(tmp_path / "out"), "--valid-percent", "0"]
    assert main(arguments) == 0 and splits(tmp_path / "out") == {"train": ["good.wav", "nan.wav"]}
    assert main([*arguments, "--decode"]) == 0 and splits(tmp_path / "out") == {"train": ["good.wav"]}
    assert re.search(says("1 samples", "NaN", 5000), left_out(tmp_path / "out")["nan.wav"])


def test_nothing_that_the_decoder_meets_ends_the_scan(tmp_path: Path) -> None:
    """A header without a length or with a wrong one; a format without a header; a pipe without a writer."""
    folder = many(tmp_path / "audio", 2)
    soundfile.write(folder / "a.flac", tone(2), 16000)
    data = (folder / "a.flac").read_bytes()
    for name, samples in (("unknown.flac", 0), ("absurd.flac", 1 << 35)):
        header = int.from_bytes(data[18:26], "big") >> 36 << 36 | samples
        (folder / name).write_bytes(data[:18] + header.to_bytes(8, "big") + data[26:])
    (folder / "numbers.raw").write_bytes(bytes(32000))
    os.mkfifo(folder / "pipe.wav")
    options = ["--ext", "flac", "wav", "raw", "--valid-percent", "0"]
    assert main([str(folder), str(tmp_path / "out"), *options]) == 1  # most are skipped
    assert splits(tmp_path / "out")["train"] == ["a.flac", "speaker0/000.wav", "speaker1/001.wav"]
    reasons = left_out(tmp_path / "out")
    assert set(reasons) == {"unknown.flac", "absurd.flac", "numbers.raw", "pipe.wav"}
    assert all(reason.startswith("unreadable\t") for reason in reasons.values())
    assert "no length" in reasons["unknown.flac"] and "not a regular file" in reasons["pipe.wav"]


def test_split_shares_out_everything_reproducibly(tmp_path: Path) -> None:
    folder = many(tmp_path / "audio", 40)

    def run(name: str, seed: str) -> dict[str, list[str]]:
        options = ["--valid-percent", "10", "--test-percent", "25", "--seed", seed]
        assert main([str(folder), str(tmp_path / name), *options]) == 0
        return splits(tmp_path / name)

    first, again, other = run("first", "0"), run("again", "0"), run("other", "1")
    assert first == again and first != other
    for parts in (first, other):
        assert {name: len(paths) for name, paths in parts.items()} == {"train": 26, "valid": 4, "test": 10}
        assert sorted(sum(parts.values(), [])) == sorted(str(p.relative_to(folder)) for p in folder.rglob("*.wav"))
        assert all(paths == sorted(paths) for paths in parts.values())


def test_split_depends_on_paths_below_the_folder_only(tmp_path: Path) -> None:
    options = ["--valid-percent", "20"]
    for name in ("here", "there"):
        assert main([str(many(tmp_path / name, 10)), str(tmp_path / f"out-{name}"), *options]) == 0
    assert splits(tmp_path / "out-here") == splits(tmp_path / "out-there")


def test_a_split_asked_for_is_never_empty(tmp_path: Path) -> None:
    assert main([str(many(tmp_path / "audio", 5)), str(tmp_path / "out")]) == 0
    assert {name: len(paths) for name, paths in splits(tmp_path / "out").items()} == {"train": 4, "valid": 1}


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    many(tmp_path / "store", 3)
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / "link").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "loop").symlink_to(tmp_path / "store")
    assert main([str(tmp_path / "audio"), str(tmp_path / "out"), "--valid-percent", "0"]) == 0
    assert splits(tmp_path / "out")["train"] == [f"link/speaker{index}/00{index}.wav" for index in range(3)]


def fails(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    return message


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder, out = many(tmp_path / "audio", 3), tmp_path / "out"
    assert re.search(says(tmp_path / "nothing", "folder"), fails(capsys, tmp_path / "nothing", out))
    assert re.search(says("no files", "flac"), fails(capsys, folder, out, "--ext", "flac"))
    assert "--valid-percent: 100.0" in fails(capsys, folder, out, "--valid-percent", 100)
    assert "0 <= min <= max" in fails(capsys, folder, out, "--min-seconds", 2, "--max-seconds", 1)
    for option, value in (
        ("--min-seconds", "nan"),
        ("--max-seconds", "inf"),
        ("--max-seconds", "1e999"),
        ("--test-percent", "-1"),
        ("--jobs", "-1"),
        ("--jobs", "0"),
        ("--seed", "-1"),
        ("--sample-rate", "0"),
        ("--speaker", "("),
    ):
        assert f"{option}: " in fails(capsys, folder, out, option, value)
    (tmp_path / "file").touch()
    assert f"OUT: {tmp_path / 'file'}/" in fails(capsys, folder, tmp_path / "file")
    assert not out.exists()
    assert "train.tsv" in fails(capsys, folder, out, "--valid-percent", 50, "--test-percent", 50)
    assert re.search(says("none", "3 files"), fails(capsys, folder, out, "--min-seconds", 5))
    assert splits(out) == {} and len(left_out(out)) == 3


def test_a_stale_split_is_not_left_beside_a_new_train_set(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder, out = many(tmp_path / "audio", 4), tmp_path / "out"
    assert main([str(folder), str(out), "--test-percent", "25"]) == 0
    before = splits(out)
    assert re.search(says("test.tsv", "exists", "--test-percent"), fails(capsys, folder, out))
    assert splits(out) == before


def librispeech(folder: Path) -> Path:
    for part, speakers in (("train-clean-100", range(10)), ("train-other-500", range(10, 16)), ("dev-clean", (90, 91))):
        for speaker in speakers:
            for chapter in range(2):
                for utterance in range(2):
                    name = f"{part}/{speaker}/{chapter}/{speaker}-{chapter}-{utterance:04d}.flac"
                    write(folder / name, tone(0.5))
    return folder


def test_training_folders_split_by_speaker(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    corpus, out = librispeech(tmp_path / "LibriSpeech"), tmp_path / "out"
    folders = [str(corpus / name) for name in ("train-clean-100", "train-other-500")]
    assert main([*folders, str(out), "--split-by", "speaker", "--valid-percent", "12"]) == 0
    assert read_manifest(out / "train.tsv").root == corpus
    found = splits(out)
    speakers = {name: {path.split("/")[1] for path in paths} for name, paths in found.items()}
    assert not speakers["train"] & speakers["valid"] and len(found["train"]) + len(found["valid"]) == 64
    assert len(found["valid"]) == 8 and not any("dev-clean" in path for path in sum(found.values(), []))
    printed, warned = capsys.readouterr()
    assert "8 recordings of 2 speakers" in printed and "warning" not in warned
    assert not (out / "unfinished_scan.jsonl").exists()

    assert (
        main(
            [
                str(corpus),
                str(tmp_path / "same"),
                "--split-by",
                "speaker",
                "--valid-percent",
                "12",
                "--include",
                "train-*",
            ]
        )
        == 0
    )
    assert splits(tmp_path / "same") == found


def test_folders_named_like_test_sets_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    corpus, out = librispeech(tmp_path / "LibriSpeech"), str(tmp_path / "out")
    write(corpus / "devon" / "testimony" / "1.flac", tone(0.5))
    assert main([str(corpus), out]) == 0
    assert re.search(says("warning", "8 recordings", "dev-clean"), capsys.readouterr().err)
    assert main([str(corpus), out, "--exclude", "dev-*"]) == 0
    assert "warning" not in capsys.readouterr().err


def test_one_odd_name_is_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder, out = many(tmp_path / "audio", 9), tmp_path / "out"
    names = {b"caf\xe9.wav": "is not UTF-8", b" blank.wav": "begins with a blank", b"a\x85b.wav": "is not UTF-8"}
    names.update({"\u3000wide.wav".encode(): "begins with a blank", "a\u2028b.wav".encode(): "has a tab or line break"})
    for name in names:
        target = os.fsencode(folder) + b"/" + name
        with open(target, "wb") as stream:
            stream.write((folder / "speaker0" / "000.wav").read_bytes())
    assert main([str(folder), str(out), "--valid-percent", "20"]) == 0
    assert sum(map(len, splits(out).values())) == 9
    assert left_out(out) == {repr(os.fsdecode(name)): f"unusable name\t{reason}" for name, reason in names.items()}
    assert re.search(says("unusable name", 5, "' blank.wav'"), capsys.readouterr().out)


@pytest.mark.parametrize("name", ["tab\tin it", "blank ", "line\nbreak", "caf\udce9"])
def test_a_root_that_no_manifest_can_hold_is_refused_before_the_scan(
    tmp_path: Path, capsys: pytest.CaptureFixture, name: str
) -> None:
    folder = many(tmp_path / "plain", 2).rename(tmp_path / name)
    assert "rename" in fails(capsys, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_line_that_converts_is_safe_to_paste(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("l'\u00e9t\u00e9;touch RAN;'.wav", "\x1b[31mred.wav", "-y.wav"):
        folder = tmp_path / "audio"
        write(folder / name, tone(1, 8000), 8000)
        assert main([str(folder), str(tmp_path / "out")]) == 2
        printed, error = capsys.readouterr()
        assert "\x1b" not in printed + error
        line = next(line for line in printed.splitlines() if "convert it: " in line).partition("convert it: ")[2]
        said = subprocess.run(
            ["bash", "-c", f'ffmpeg() {{ printf "%s\\0" "$@"; }}; {line}'], capture_output=True, check=True
        ).stdout.decode()
        assert said.split("\0")[:-1] == [
            "-i",
            str(folder / name),
            "-ar",
            "16000",
            "-ac",
            "1",
            f"./{name.removesuffix('.wav')}.16k.flac",
        ]
        (folder / name).unlink()
    assert not (tmp_path / "RAN").exists()


def test_a_terminated_scan_ends_cleanly_and_the_same_command_goes_on(tmp_path: Path) -> None:
    folder, out = tmp_path / "audio", tmp_path / "out"
    write(folder / "0000.wav", tone(0.5))
    content = (folder / "0000.wav").read_bytes()
    for i in range(1, 1500):
        (folder / f"{i:04d}.wav").write_bytes(content)
    arguments = [sys.executable, "-c", COMMAND, str(folder), str(out), "--jobs", "1", "--decode"]
    child = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    progress = out / "unfinished_scan.jsonl"
    while child.poll() is None and not (progress.exists() and progress.stat().st_size):
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    _, error = child.communicate()
    assert child.returncode == 128 + signal.SIGTERM and "ended by SIGTERM" in error and "Traceback" not in error
    assert [entry.name for entry in out.iterdir()] == ["unfinished_scan.jsonl"]
    assert main([str(folder), str(out), "--decode"]) == 0
    assert sum(map(len, splits(out).values())) == 1500 and not progress.exists()
