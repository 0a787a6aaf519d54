"""Letters from frozen features."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from messages import says

from skill_fairseq.audio.manifest import write_manifest
from skill_fairseq.probing.evaluate import evaluate, outcomes
from skill_fairseq.probing.letters import by_speaker, edits, greedy, probe_letters
from skill_fairseq.probing.tasks import read_task

ALPHABET = "AB "


def brute_edits(found: str, wanted: str) -> int:
    if not found or not wanted:
        return len(found) + len(wanted)
    rest = brute_edits(found[1:], wanted[1:]) + (found[0] != wanted[0])
    return min(rest, 1 + brute_edits(found[1:], wanted), 1 + brute_edits(found, wanted[1:]))


def test_edits_are_the_fewest() -> None:
    words = ["".join(word) for n in range(4) for word in itertools.product("AB", repeat=n)]
    for found, wanted in itertools.product(words, words):
        assert edits(found, wanted) == brute_edits(found, wanted)


def test_repeats_and_blanks_are_left_out() -> None:
    path = [0, 1, 1, 0, 1, 2, 2, 0]
    assert greedy(torch.eye(3)[path]) == [1, 1, 2]


def test_values_by_speaker_have_the_rate_as_mean_whatever_the_lengths() -> None:
    names, values = by_speaker([2, 0, 3], [10, 5, 4], ["b", "a", "b"])
    assert names == ["a", "b"] and values.mean() == pytest.approx(5 / 19)
    assert values[1] - values[0] == pytest.approx((5 - 5 / 19 * 14) / 9.5 - (0 - 5 / 19 * 5) / 9.5)


def spoken(text: str, generator: torch.Generator) -> torch.Tensor:
    """(2, T, 5): noise in layer 0; in layer 1 each letter is three frames of its dimension, with one frame between."""
    frames = [4 if i % 4 == 0 else ALPHABET.index(letter) for letter in text for i in range(4)]
    noise = torch.randn(2, len(frames), 5, generator=generator)
    noise[1] = 0.3 * noise[1] + 3 * torch.eye(5)[frames]
    return noise


def texts(number: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list(ALPHABET), size=rng.integers(3, 9))) for _ in range(number)]


def test_what_the_frames_say_is_read_and_the_layer_that_says_it_found() -> None:
    generator = torch.Generator().manual_seed(0)
    transcripts = {"train": texts(200, 1), "valid": texts(10, 2), "test": texts(12, 3)}
    features = {split: [spoken(text, generator) for text in found] for split, found in transcripts.items()}
    speakers = [f"s{i % 4}" for i in range(12)]
    found = probe_letters(features, transcripts, speakers)
    assert found.rate < 0.05 and found.layer_weights[1] > 0.6 and found.symbols == 3
    assert found.rate == pytest.approx(sum(found.errors) / found.letters) == pytest.approx(np.mean(found.by_speaker))
    assert found == probe_letters(features, transcripts, speakers)  # the seed decides
    noise = {split: [x[:1] for x in states] for split, states in features.items()}
    lost = probe_letters(noise, transcripts, speakers[:10] + ["s0", "s0"])
    assert lost.rate > 0.5 and lost.interval is not None and lost.interval[0] < lost.rate < lost.interval[1]
    few = probe_letters(noise, transcripts, ["a"] * 12)
    assert few.interval is None and few.no_interval == "1 speaker, an interval needs 3 or more"


def write_task(folder: Path, small: Any, transcript: str = "AB A") -> Path:
    for split in ("train", "valid", "test"):
        folder.mkdir(exist_ok=True)
        rows = ["utterance\tspeaker\ttranscript"]
        for i in range(3):
            soundfile.write(str(folder / f"{split}{i}.wav"), small.tone(0.5, i), 16000)
            rows.append(f"{split}{i}\tspeaker{i}\t{transcript if i else 'BAB'}")
        write_manifest(folder / f"{split}.tsv", ".", [f"{split}{i}.wav" for i in range(3)], [8000] * 3)
        (folder / f"{split}.labels.tsv").write_text("\n".join(rows) + "\n")
    return folder


def test_a_task_with_transcripts_is_one_of_letters(tmp_path: Path, small: Any) -> None:
    task = read_task(write_task(tmp_path / "words", small))
    assert task.transcribed and task.labels["test"] == ["BAB", "AB A", "AB A"]

    def features(wave: torch.Tensor) -> list[list[torch.Tensor]]:
        return [[wave.unfold(0, 320, 320)[:, :8]] * 2]

    entry = evaluate(features, [task], "x")["words"]
    assert entry["metric"] == "letter error rate" and entry["samples"] == "11 letters in 3 recordings of 3 speakers"
    values, speakers = outcomes(entry)
    assert speakers == ["speaker0", "speaker1", "speaker2"] and values.mean() == pytest.approx(entry["value"])
    assert entry["value"] == pytest.approx(sum(entry["errors"]) / 11) and entry["skipped"] == 0


def test_empty_transcripts_are_refused_by_line(tmp_path: Path, small: Any) -> None:
    with pytest.raises(ValueError, match=says("train.labels.tsv, line 3", "no transcript")):
        read_task(write_task(tmp_path / "words", small, " "))
