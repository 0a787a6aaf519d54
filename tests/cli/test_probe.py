"""skill-probe on the speech of the example."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from messages import says

from skill_fairseq.audio.manifest import read_manifest, write_manifest
from skill_fairseq.checkpoints import save_encoder
from skill_fairseq.cli.probe import main
from skill_fairseq.files import sha256
from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.probing.evaluate import outcomes
from skill_fairseq.versions import versions

TASKS = Path(__file__).resolve().parents[2] / "examples" / "tiny" / "data" / "tasks"


def small_task(folder: Path, source: str = "digit", every: int = 8) -> Path:
    """Every eighth recording of a task, in another folder, with an absolute root."""
    target = folder / source
    for split in ("train", "valid", "test"):
        manifest = read_manifest(TASKS / source / f"{split}.tsv")
        chosen = range(0, len(manifest), every)
        paths, sizes = [manifest.paths[i] for i in chosen], [manifest.sizes[i] for i in chosen]
        write_manifest(target / f"{split}.tsv", manifest.root, paths, sizes)
        header, *rows = (TASKS / source / f"{split}.labels.tsv").read_text().splitlines()
        (target / f"{split}.labels.tsv").write_text("\n".join([header, *(rows[i] for i in chosen)]) + "\n")
    return target


def verification_task(folder: Path) -> Path:
    """All pairs of three recordings of each of six speakers."""
    manifest = read_manifest(TASKS / "speaker" / "test.tsv")
    chosen = [i for i in range(len(manifest)) if i % 20 in (0, 7, 14)]
    target = folder / "pairs"
    paths = [manifest.paths[i] for i in chosen]
    write_manifest(target / "test.tsv", manifest.root, paths, [manifest.sizes[i] for i in chosen])
    who = [Path(path).stem.split("-")[1] for path in paths]
    rows = ["same\tutterance_a\tutterance_b"]
    for i, first in enumerate(paths):
        rows += [f"{int(who[i] == who[j])}\t{first}\t{paths[j]}" for j in range(i)]
    said = [f"{path}\t{name}" for path, name in zip(paths, who)]
    (target / "test.speakers.tsv").write_text("\n".join(["utterance\tspeaker", *said]) + "\n")
    (target / "trials.tsv").write_text("\n".join(rows) + "\n")
    return target


def saved_encoder(path: Path) -> str:
    torch.manual_seed(0)
    config = EncoderConfig(
        conv_feature_layers="[(16,10,5)] + [(16,8,8)] * 2",
        encoder_layers=1,
        encoder_embed_dim=16,
        encoder_ffn_embed_dim=16,
        encoder_attention_heads=2,
        conv_pos=8,
        conv_pos_groups=2,
    )
    save_encoder(SpeechEncoder(config), path)
    return str(path)


def probed(capsys: pytest.CaptureFixture, *words: object) -> tuple[dict[str, Any], list[str]]:
    """What --json prints, and the lines of the text."""
    assert main([*map(str, words), "--json"]) == 0
    printed = capsys.readouterr()
    return json.loads(printed.out), printed.err.splitlines()


def results(said: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(entry["model"], entry["task"]): entry for entry in said["results"]}


def test_recordings_that_cannot_be_read_are_left_out_named_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    target = small_task(tmp_path)

    def run() -> dict[str, Any]:
        return results(probed(capsys, "logmel", "--task", target)[0])["logmel", "digit"]

    whole = run()
    root, first, second, *rest = (target / "test.tsv").read_text().splitlines()
    broken = tmp_path / Path(second.split("\t")[0]).name
    broken.write_bytes(b"fLaC" + bytes(1000))
    (target / "test.tsv").write_text("\n".join([root, first, f"{broken}\t8000", *rest, ""]))
    part = run()
    assert (whole["skipped"], part["skipped"]) == (0, 1) and str(broken) in caplog.text
    assert part["total"] == whole["total"] - 1
    assert part["right"] == whole["right"][:1] + whole["right"][2:]


def test_log_mel_knows_speakers_and_some_digits_of_unseen_speakers(capsys: pytest.CaptureFixture) -> None:
    record, said = probed(capsys, "logmel", "--task", TASKS / "digit", "--task", TASKS / "speaker")
    digit, speaker = results(record)["logmel", "digit"], results(record)["logmel", "speaker"]
    assert (digit["total"], digit["classes"], speaker["total"], speaker["classes"]) == (300, 10, 120, 6)
    assert 0.4 < digit["value"] < 0.6 and speaker["value"] > 0.9
    for entry in (digit, speaker):
        assert entry["value"] == entry["correct"] / entry["total"] and entry["layer_weights"] == [1.0]
        assert len(entry["right"]) == len(entry["speakers"]) == entry["total"]
    low, high = speaker["interval"]
    assert 0 <= low < speaker["value"] <= high <= 1 and speaker["no_interval"] is None
    assert digit["interval"] is None and digit["no_interval"].startswith("2 speakers,")
    assert f"{100 * speaker['value']:.1f} [{100 * low:.1f}, {100 * high:.1f}]" in said[2]
    assert f"  {100 * digit['value']:.1f}  " in said[2] and said[3] == f"digit: no interval: {digit['no_interval']}"


def test_several_models_and_tasks_make_one_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    encoder = saved_encoder(tmp_path / "student.safetensors")
    tasks = [small_task(tmp_path, "speaker"), verification_task(tmp_path)]
    models = [f"student={encoder}", f"untrained=random:{encoder}", "logmel"]
    options = ["--plot", tmp_path / "probe.png", "--seed", 3]
    options += [word for task in tasks for word in ("--task", task)]
    record, lines = probed(capsys, *models, *options)
    assert len(lines) == 5 and "speaker, accuracy %" in lines[0] and "pairs, equal error rate %" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == ["student", "untrained", "logmel"]
    found = results(record)
    assert len(found) == 6
    for line in lines[2:]:
        for task in ("speaker", "pairs"):
            entry = found[line.split()[0], task]
            low, high = (100 * bound for bound in entry["interval"])
            assert f"{100 * entry['value']:.1f} [{low:.1f}, {high:.1f}]" in line
            assert outcomes(entry)[0].mean() == pytest.approx(entry["value"])
    assert len(found["student", "speaker"]["layer_weights"]) == 2
    for task, samples in (("pairs", 6), ("speaker", 15)):
        values, speakers = outcomes(found["student", task])
        assert len(values) == len(speakers) == samples and len(set(speakers)) == 6
    assert found["logmel", "pairs"]["trials"] == 153 and 0 < found["logmel", "pairs"]["value"] < 0.4
    assert found["student", "speaker"]["parameters"] == found["untrained", "speaker"]["parameters"]
    assert found["student", "speaker"]["layer_weights"] != found["untrained", "speaker"]["layer_weights"]
    assert (tmp_path / "probe.png").read_bytes().startswith(b"\x89PNG")


def test_the_record_says_what_was_probed_with_what(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    encoder = saved_encoder(tmp_path / "student.safetensors")
    task = small_task(tmp_path)
    said, _ = probed(capsys, f"one={encoder}", f"none=random:{encoder}", "logmel", "--task", task, "--seed", 7)
    assert said["versions"] == versions("scikit-learn") and said["seed"] == 7
    content = sha256(encoder)
    assert said["models"]["one"] == {"kind": "encoder", "sha256": content}
    assert said["models"]["none"] == {"kind": "random", "sha256": content}
    assert said["models"]["logmel"] == {"kind": "logmel", "sha256": None}
    assert said["tasks"] == {"digit": {file.name: sha256(file) for file in task.iterdir()}}
    assert str(tmp_path) not in json.dumps(said)


def test_without_scikit_learn_it_says_so_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)  # not installed
    message = fails(capsys, "gone.pt", "--task", TASKS / "digit")  # not even the model has been read
    assert "'digit'" in message and "scikit-learn" in message and "'.[probe]'" in message
    assert main(["logmel", "--task", str(verification_task(tmp_path))]) == 0


def test_a_second_run_gives_the_same_figures(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    encoder = saved_encoder(tmp_path / "student.safetensors")
    words = [f"random:{encoder}", "--task", small_task(tmp_path, "digit")]
    assert probed(capsys, *words) == probed(capsys, *words)


def fails(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    return message


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    digit = TASKS / "digit"
    assert re.search(says(tmp_path / "none", "task folder"), fails(capsys, "logmel", "--task", tmp_path / "none"))
    assert re.search(says("gone.pt", "model file"), fails(capsys, "gone.pt", "--task", digit))
    assert re.search(says("'logmel'", "2 times"), fails(capsys, "logmel", "logmel", "--task", digit))
    assert re.search(says("'digit'", "2 times"), fails(capsys, "logmel", "--task", digit, "--task", digit))
    assert re.search(says("a.xyz", "ending"), fails(capsys, "logmel", "--task", digit, "--plot", tmp_path / "a.xyz"))
    foreign = tmp_path / "speech.pt"
    foreign.write_bytes(next(TASKS.parent.glob("audio/*/*/*.flac")).read_bytes())
    assert str(foreign) in fails(capsys, foreign, "--task", digit)
    assert list(tmp_path.iterdir()) == [foreign]
