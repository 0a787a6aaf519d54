"""skill-labels converts transcripts of every layout to labels for fairseq."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from messages import says

from skill_fairseq.audio.manifest import read_manifest, write_manifest
from skill_fairseq.cli.labels import main
from skill_fairseq.labels.transcripts import read_transcripts
from skill_fairseq.labels.units import too_short

TEXTS = {
    "train": {"84-1-0000": "IT'S A TEST", "84-1-0001": "A SECOND LINE", "84-2-0000": "AND THE THIRD ONE"},
    "valid": {"90-1-0000": "A NEW LINE"},
}


def write_data(root: Path, texts: dict[str, dict[str, str]] = TEXTS, seconds: float = 2.0) -> list[str]:
    """LibriSpeech's audio layout, and one manifest per split; the manifests' paths."""
    for split, rows in texts.items():
        paths = []
        for name in rows:
            speaker, chapter = name.split("-")[:2]
            path = f"{speaker}/{chapter}/{name}.flac"
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(str(root / path), np.zeros(round(16000 * seconds)), 16000)
            paths.append(path)
        write_manifest(root / f"{split}.tsv", ".", paths, [round(16000 * seconds)] * len(paths))
    return [str(root / f"{split}.tsv") for split in texts]


def trans(root: Path, texts: dict[str, dict[str, str]] = TEXTS) -> Path:
    """LibriSpeech's *.trans.txt beside the audio; their folder."""
    for rows in texts.values():
        for name, text in rows.items():
            speaker, chapter = name.split("-")[:2]
            with open(root / speaker / chapter / f"{speaker}-{chapter}.trans.txt", "a", encoding="utf-8") as file:
                file.write(f"{name} {text}\n")
    return root


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def test_letters_in_fairseqs_convention(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    manifests, out = write_data(tmp_path / "data"), tmp_path / "out"
    assert main([*manifests, "--transcripts", str(trans(tmp_path / "data")), "--out", str(out)]) == 0
    assert lines(out / "train.ltr") == [
        "I T ' S | A | T E S T |",
        "A | S E C O N D | L I N E |",
        "A N D | T H E | T H I R D | O N E |",
    ]
    assert lines(out / "train.wrd") == list(TEXTS["train"].values()) and lines(out / "valid.wrd") == ["A NEW LINE"]
    counts = {row.split(" ")[0]: int(row.split(" ")[1]) for row in lines(out / "dict.ltr.txt")}
    assert counts["|"] == 10 and counts["E"] == 5 and counts["'"] == 1 and len(counts) == 14
    assert [*counts.values()] == sorted(counts.values(), reverse=True)
    for split in TEXTS:  # fairseq resolves a relative root against the working directory
        copy, original = read_manifest(out / f"{split}.tsv"), read_manifest(tmp_path / "data" / f"{split}.tsv")
        assert lines(out / f"{split}.tsv")[0] == str(original.root) and copy.paths == original.paths
    printed = capsys.readouterr().out
    assert "upper case; 14 characters kept: ' A C D E H I L N O R S T W" in printed
    assert "'W' 1" in printed and "<unk>" in printed  # NEW is only in valid
    assert f"task.data={out} task.labels=ltr" in printed


def test_fairseq_reads_them(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """fairseq's dictionary and post-processing restore the words, for letters and pieces."""
    from fairseq.data import Dictionary
    from fairseq.data.data_utils import post_process

    manifests, source = write_data(tmp_path), str(trans(tmp_path))
    sized = ["--units", "bpe", "--vocabulary-size", "20"]
    for labels, symbol, options in (("ltr", "letter", []), ("spm", "sentencepiece", sized)):
        out = tmp_path / labels
        assert main([*manifests, "--transcripts", source, "--out", str(out), *options]) == 0
        dictionary = Dictionary.load(str(out / f"dict.{labels}.txt"))
        rows = lines(out / f"train.{labels}")
        for row, words in zip(rows, TEXTS["train"].values()):
            ids = dictionary.encode_line(row, append_eos=False, add_if_not_exist=False)
            assert dictionary.unk() not in ids.tolist()
            assert post_process(dictionary.string(ids), symbol) == words
        assert len(dictionary) == 4 + (14 if labels == "ltr" else 20)
        assert sum(dictionary.count[4:]) == sum(len(row.split()) for row in rows)
    assert any(len(piece.strip("\u2581")) > 1 for piece in (tmp_path / "spm" / "train.spm").read_text("utf-8").split())


@pytest.mark.parametrize("options", [[], ["--units", "unigram", "--vocabulary-size", "18"]])
def test_units_of_an_earlier_run(tmp_path: Path, options: list[str]) -> None:
    manifests, source = write_data(tmp_path), str(trans(tmp_path))
    one, other = tmp_path / "one", tmp_path / "other"
    assert main([*manifests, "--transcripts", source, "--out", str(one), *options]) == 0
    assert main([manifests[1], "--transcripts", source, "--out", str(other), "--units-of", str(one)]) == 0
    ending = "spm" if options else "ltr"
    assert lines(other / f"valid.{ending}") == lines(one / f"valid.{ending}")
    symbols = [[row.split(" ")[0] for row in lines(out / f"dict.{ending}.txt")] for out in (one, other)]
    assert symbols[0] == symbols[1]


@pytest.mark.parametrize(
    "header, key",
    [("path\ttext", "{path}"), ("", "{path}"), ("utterance\tspeaker\ttranscript", "{name}\tx"), ("", "{bare}")],
)
def test_tab_separated_transcripts(tmp_path: Path, header: str, key: str) -> None:
    manifests = write_data(tmp_path)
    rows = [header] if header else []
    for texts in TEXTS.values():
        for name, text in reversed(texts.items()):
            bare = "/".join([*name.split("-")[:2], name])
            rows.append(f"{key.format(path=f'{bare}.flac', name=name, bare=bare)}\t{text}")
    (tmp_path / "text.tsv").write_text("\n".join(rows) + "\n")
    assert main([*manifests, "--transcripts", str(tmp_path / "text.tsv"), "--out", str(tmp_path / "out")]) == 0
    assert lines(tmp_path / "out" / "train.wrd") == list(TEXTS["train"].values())


def test_normalisation_is_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    texts = {"train": {"1-1-1": "\ufb01ve, \u201cit\u2019s\u201d  well-known \u2026 \u00e9t\u00e9!"}}
    manifests, out = write_data(tmp_path, texts), tmp_path / "out"
    arguments = [*manifests, "--transcripts", str(trans(tmp_path, texts)), "--out", str(out)]
    assert main(arguments) == 0
    assert lines(out / "train.wrd") == ["FIVE IT'S WELL KNOWN \u00c9T\u00c9"]
    printed = capsys.readouterr().out
    assert "'.' 3, ',' 1" in printed and "'-' 1" in printed
    assert main([*arguments, "--case", "lower", "--characters", "abcdefghijklmnopqrstuvwxyz-\u00e9"]) == 0
    assert lines(out / "train.wrd") == ["five it s well-known \u00e9t\u00e9"]


@pytest.mark.parametrize(
    "text, options, said",
    [
        ("room 101", [], ["not kept", "'1' 2", "'0' 1", "1/1/1-1-1.flac", "'room 101'"]),
        ("caf\u00e9", ["--characters", "ACF"], ["not kept", "'\u00c9' 1"]),
        ("...", [], ["nothing", "1/1/1-1-1.flac"]),
        ("a b", ["--characters", "AB|"], ["--characters: |", "word boundaries"]),
        (
            "a b",
            ["--units", "unigram", "--vocabulary-size", "900"],
            ["--vocabulary-size: 900", "at most 3"],
        ),
        ("abc def", ["--units", "bpe", "--vocabulary-size", "3"], ["--vocabulary-size: 3", "at least 7"]),
        ("a b", ["--units-of", "."], ["dict.ltr.txt", "dict.spm.txt"]),
    ],
)
def test_texts_that_cannot_be_used(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    text: str,
    options: Any,
    said: list,
) -> None:
    texts = {"train": {"1-1-1": text}}
    manifests, out = write_data(tmp_path, texts), tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    assert main([*manifests, "--transcripts", str(trans(tmp_path, texts)), "--out", str(out), *options]) == 2
    assert re.search(says(*said), capsys.readouterr().err)
    assert not out.exists()


def test_every_recording_needs_one_transcript(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    manifests, out, file = write_data(tmp_path), tmp_path / "out", tmp_path / "text.tsv"
    for written, said in (
        ("84-1-0000\tA\n90-1-0000\tA\n", ["train.tsv", "2 of 3", "transcript", "84/1/84-1-0001.flac"]),
        ("84-1-0000\tA\n84-1-0000\tB\n", ["text.tsv", "line 2", "84-1-0000", "another text"]),
        ("84-1-0000\tA\n84-1-0001\t\n", ["text.tsv", "line 2", r"'84-1-0001\t'"]),
    ):
        file.write_text(written)
        assert main([*manifests, "--transcripts", str(file), "--out", str(out)]) == 2
        assert re.search(says(*said), capsys.readouterr().err)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        soundfile.write(str(tmp_path / name / "x.wav"), np.zeros(16000), 16000)
    write_manifest(tmp_path / "twins.tsv", ".", ["a/x.wav", "b/x.wav"], [16000, 16000])
    file.write_text("x\tONE\n")
    assert main([str(tmp_path / "twins.tsv"), "--transcripts", str(file), "--out", str(out)]) == 2
    assert re.search(says("1 transcript names", "x (a/x.wav, b/x.wav)"), capsys.readouterr().err)
    for missing in ("nothing.tsv", "a"):
        assert main([*manifests, "--transcripts", str(tmp_path / missing), "--out", str(out)]) == 2
        assert str(tmp_path / missing) in capsys.readouterr().err
    assert not out.exists()


def test_manifests_are_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    manifests, source = write_data(tmp_path), str(trans(tmp_path))
    before = (tmp_path / "train.tsv").read_bytes()
    assert main([*manifests, "--transcripts", source, "--out", str(tmp_path)]) == 2
    assert re.search(says("root '.'", "relative"), capsys.readouterr().err)
    assert (tmp_path / "train.tsv").read_bytes() == before and not (tmp_path / "train.ltr").exists()
    assert main([manifests[0], manifests[0], "--transcripts", source, "--out", str(tmp_path / "out")]) == 2
    assert re.search(says("train.tsv", "2 manifests"), capsys.readouterr().err)
    one = read_manifest(manifests[0])
    write_manifest(manifests[0], tmp_path, one.paths, one.sizes)  # an absolute root works from anywhere
    assert main([manifests[0], "--transcripts", source, "--out", str(tmp_path)]) == 0
    assert lines(tmp_path / "train.wrd") == list(TEXTS["train"].values())


def test_recordings_too_short_for_ctc_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """ "A A |" has three units, and "AA|" needs a blank between its two: four frames; 1040 samples make three."""
    assert too_short([1039, 1040, 1040, 1360], [["A", "|", "A"]] * 2 + [["A", "A", "|"]] * 2) == [0, 2]
    texts = {"train": {"1-1-1": "AAAA"}}
    manifests = write_data(tmp_path, texts, seconds=0.1)
    assert main([*manifests, "--transcripts", str(trans(tmp_path, texts)), "--out", str(tmp_path / "out")]) == 0
    assert re.search(says("1 recordings", "fewer frames of 20 ms"), capsys.readouterr().out)
    assert too_short([1359, 1360, 1360], [["A", "|"]] * 2 + [["A", "A"]], time_reduction=2) == [0, 2]


def test_an_empty_last_column_is_not_the_one_before_it(tmp_path: Path) -> None:
    file = tmp_path / "texts.tsv"
    file.write_text("path\tspeaker\ttext\na.flac\tjackson\t\n")
    with pytest.raises(ValueError, match=says(file, "line 2", "path", "text")):
        read_transcripts([file])


COMMON_VOICE = "client_id\tpath\tsentence_id\tsentence\tsentence_domain\tup_votes\tage\tlocale\tsegment"


@pytest.mark.parametrize(
    ("header", "row", "options"),
    [
        ("path\tsentence\tlocale", "{name}.flac\t{text}\ten", []),
        (COMMON_VOICE, "0a1b\t{name}.mp3\tf00\t{text}\t\t2\t\ten\t", []),
        ("locale\ttext\tid", "en\t{text}\t{name}", []),
        ("path\tsentence\tlemma", "{name}\ten\t{text}", ["--column", "lemma"]),
        ("\ufeffpath\ttext", "{name}\t{text}", []),
        ("utterance\tspeaker\tTranscript", "{name}\ten\t{text}", []),
    ],
)
def test_tables_by_the_names_of_their_columns(tmp_path: Path, header: str, row: str, options: list[str]) -> None:
    manifests, table = write_data(tmp_path), tmp_path / "text.tsv"
    rows = [row.format(name=name, text=text) for texts in TEXTS.values() for name, text in texts.items()]
    table.write_text("\r\n".join([header, *rows, ""]), encoding="utf-8", newline="")
    assert main([*manifests, "--transcripts", str(table), "--out", str(tmp_path / "out"), *options]) == 0
    assert lines(tmp_path / "out" / "train.wrd") == list(TEXTS["train"].values())


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        (
            "84-1-0000\tA LINE\ten\n",
            [],
            ["line 1", "'84-1-0000', 'A LINE', 'en'", "named path"],
        ),
        ("path\tlocale\n84-1-0000\ten\n", [], ["line 1", "path or file", "sentence or text"]),
        ("clip\tsentence\tlocale\nx\ty\ten\n", [], ["line 1", "'clip', 'sentence', 'locale'"]),
        ("path\tsentence\nx\ty\n", ["--column", "words"], ["line 1", "named words"]),
        ("path\tsentence\tlocale\nx\ty\n", [], ["line 2", "2 columns", r"'x\ty'", 3]),
        ("path\tsentence\tlocale\nx\t\ten\n", [], ["line 2", r"'x\t\ten'"]),
        ("84-1-0000 A LINE\n", ["--column", "text"], ["line 1", "'84-1-0000 A LINE'", "names"]),
        ("x\ta\nx.mp3\tb\n", [], ["3 of 3", "transcript"]),
    ],
)
def test_a_language_never_becomes_a_transcript(
    tmp_path: Path, capsys: pytest.CaptureFixture, content: str, options: list[str], said: list
) -> None:
    manifests, table = write_data(tmp_path), tmp_path / "text.tsv"
    table.write_text(content)
    assert main([*manifests, "--transcripts", str(table), "--out", str(tmp_path / "out"), *options]) == 2
    assert re.search(says(*said), capsys.readouterr().err) and not (tmp_path / "out").exists()


def test_audio_is_not_looked_at_and_links_are_followed(tmp_path: Path) -> None:
    manifests = write_data(tmp_path / "data")
    store = trans(tmp_path / "data").rename(tmp_path / "store")
    for file in store.rglob("*.flac"):
        file.unlink()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "link").symlink_to(store)
    manifests = [name.replace("/data/", "/store/") for name in manifests]
    assert main([*manifests, "--transcripts", str(tmp_path / "text"), "--out", str(tmp_path / "out")]) == 0
    assert lines(tmp_path / "out" / "train.wrd") == list(TEXTS["train"].values())


def test_inputs_are_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    manifests, out = write_data(tmp_path / "data"), tmp_path / "out"
    source = str(trans(tmp_path / "data"))
    assert main([*manifests, "--transcripts", source, "--out", str(out)]) == 0
    texts = out / "train.wrd"
    texts.write_text("84-1-0000 A\n84-1-0001 B\n84-2-0000 C\n")
    (tmp_path / "linked.txt").symlink_to(texts)
    before = {path: path.read_bytes() for path in out.iterdir()}
    for arguments in (
        [manifests[0], "--transcripts", str(texts)],
        [manifests[0], "--transcripts", str(tmp_path / "linked.txt")],
        [manifests[1], "--transcripts", source, "--units-of", str(out)],
    ):
        assert main([*arguments, "--out", str(out)]) == 2
        assert re.search(says("--out", "overwritten"), capsys.readouterr().err)
    assert {path: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("content", ["\ufeff{root}\n{rows}\n", "{root}\r\n{rows}\r\n"])
def test_a_manifest_of_windows_is_written_anew_for_fairseq(
    tmp_path: Path, capsys: pytest.CaptureFixture, content: str
) -> None:
    manifest = Path(write_data(tmp_path, {"train": {"1-1-1": "ONE"}})[0])
    root, rows = tmp_path, manifest.read_text().splitlines()[1]
    manifest.write_bytes(content.format(root=root, rows=rows).encode())
    arguments = [str(manifest), "--transcripts", str(trans(tmp_path, {"train": {"1-1-1": "ONE"}})), "--out"]
    assert main([*arguments, str(tmp_path)]) == 2
    assert re.search(says("byte order mark", "line breaks"), capsys.readouterr().err)
    assert main([*arguments, str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "train.tsv").read_bytes() == f"{root}\n{rows}\n".encode()


def test_the_line_for_training_is_quoted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    manifests, source = write_data(tmp_path / "data"), str(trans(tmp_path / "data"))
    out = tmp_path / "it's a; folder"
    assert main([*manifests, "--transcripts", source, "--out", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()[-1].partition("use it with ")[2]
    assert shlex.split(printed) == [f"task.data={out}", "task.labels=ltr"]
