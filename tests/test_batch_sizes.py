"""Seconds of audio per batch for every recipe, from fairseq's iterator and utterances as long as LibriSpeech's.

config/README.md and the configs' comments quote the numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from fairseq.tasks import setup_task
from omegaconf import OmegaConf

from skill_fairseq.tasks.speech_dataset import SpeechDataset

CONFIG = Path(__file__).resolve().parents[1] / "config"
RATE = 16000


class Seconds(NamedTuple):
    """Seconds of audio per batch; ``least`` excludes the epoch's last batch, which holds the rest."""

    mean: float
    least: float
    most: float


MEASURED = {
    "distill/wavlm_base_plus_librispeech": Seconds(152.6, 143.0, 160.0),
    "distill/dphubert_wavlm_base_plus_librispeech": Seconds(152.6, 143.0, 160.0),
    "final/wavlm_base_plus_librispeech": Seconds(152.6, 143.0, 160.0),
    "finetune/student_ctc_librispeech100": Seconds(192.8, 173.0, 200.0),
    "finetune/student_ctc_spm_librispeech100": Seconds(192.8, 173.0, 200.0),
    "finetune/student_wav2vec_ctc_librispeech100": Seconds(192.8, 173.0, 200.0),
}


def librispeech_lengths(utterances: int = 20_000) -> np.ndarray:
    """Lengths, in samples, distributed like those of LibriSpeech's 960 hours.

    The mean is 12.3 s; most last 14 to 16 s, because the corpus was cut there; few exceed 17 s, none 35 s.
    """
    random = np.random.default_rng(0)
    kind = random.random(utterances)
    cut = random.normal(14.9, 1.0, utterances)
    whole = 1.3 + 13.2 * random.beta(1.6, 1.35, utterances)
    long = random.uniform(17, 27, utterances)
    seconds = np.where(kind < 0.585, cut, np.where(kind < 0.993, whole, long))
    return (seconds * RATE).astype(np.int64)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fairseq manifests and labels that all name one recording, which no test reads."""
    folder = tmp_path_factory.mktemp("librispeech")
    (folder / "some.flac").touch()
    lengths = librispeech_lengths()
    (folder / "train.tsv").write_text(".\n" + "".join(f"some.flac\t{n}\n" for n in lengths))
    for labels in ("ltr", "spm"):
        (folder / f"train.{labels}").write_text("A |\n" * len(lengths))
        (folder / f"dict.{labels}.txt").write_text("A 1\n| 1\n")
    return folder


def seconds_of_batches(name: str, data: Path, **dataset: Any) -> np.ndarray:
    """Seconds of every batch of fairseq's iterator for a config, without padding and cropped audio."""
    cfg = OmegaConf.load(str(CONFIG / f"{name}.yaml"))
    cfg.task.data = str(data)
    cfg.dataset.update(dataset)
    if cfg.task._name == "skill_distillation":
        cfg.task.teacher = "not loaded"
    task = setup_task(OmegaConf.merge({"tpu": False}, cfg.task))
    task.load_dataset("train", task_cfg=task.cfg)
    found = task.dataset("train")
    iterator = task.get_batch_iterator(
        found,
        max_tokens=cfg.dataset.max_tokens,
        required_batch_size_multiple=cfg.dataset.required_batch_size_multiple,
        num_shards=cfg.distributed_training.distributed_world_size,
        seed=1,
        epoch=1,
    )
    sizes = np.asarray(found.sizes)
    batches = [sizes[batch] for batch in iterator.frozen_batches]
    cropped = isinstance(found, SpeechDataset)
    samples = [len(b) * found.crop_length(b) if cropped else b.sum() for b in batches]
    return np.array(samples) / RATE


def test_lengths_are_librispeechs() -> None:
    seconds = librispeech_lengths() / RATE
    assert seconds.mean() == pytest.approx(12.3, abs=0.05)
    counts, edges = np.histogram(seconds, bins=range(0, 36, 2))
    assert edges[counts.argmax()] == 14 and 24.5 < seconds.max() < 35


@pytest.mark.parametrize("name", MEASURED)
def test_batches_hold_what_the_recipe_says(name: str, data: Path) -> None:
    seconds, said = seconds_of_batches(name, data), MEASURED[name]
    assert seconds.mean() == pytest.approx(said.mean, abs=0.5)
    assert sorted(seconds)[4] >= said.least  # one is the rest of the epoch; 3 are halves, for equal shares on 4 ranks
    assert seconds.max() <= said.most
    assert seconds.mean() > 0.94 * said.most


@pytest.mark.parametrize("name", MEASURED)
def test_fairseqs_multiple_of_8_makes_smaller_batches(name: str, data: Path) -> None:
    eights = seconds_of_batches(name, data, required_batch_size_multiple=8)
    assert eights.mean() < 0.85 * MEASURED[name].mean


def test_half_the_batch_on_twice_the_gpus(data: Path) -> None:
    """As config/run/slurm_multinode.yaml advises."""
    seconds = seconds_of_batches("distill/wavlm_base_plus_librispeech", data, max_tokens=1_280_000)
    assert seconds.mean() == pytest.approx(74.2, abs=0.5)
