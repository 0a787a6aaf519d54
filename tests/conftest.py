"""A teacher and speech small enough for real fairseq runs in seconds, and parts of such a run."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from skill_fairseq.audio.manifest import write_manifest
from skill_fairseq.checkpoints import save_encoder
from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.encoder import SpeechEncoder

# Such small models gain nothing from threads, and lose much if other processes use the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (1, 13):
    torch.backends.mkldnn.enabled = False  # its GELU has a wrong gradient there, see models/wavlm.py

SHAPE: dict[str, Any] = {
    "conv_feature_layers": "[(16,10,5)] + [(16,3,2)] * 4 + [(16,2,2)] * 2",
    "encoder_layers": 3,
    "encoder_embed_dim": 32,
    "encoder_ffn_embed_dim": 48,
    "encoder_attention_heads": 4,
    "conv_pos": 16,
    "conv_pos_groups": 4,
    "relative_position": True,
    "num_buckets": 32,
    "max_distance": 40,
}
LARGE_STYLE = {"extractor_mode": "layer_norm", "layer_norm_first": True, "conv_bias": True}


def random_encoder(seed: int = 0, **changes: Any) -> SpeechEncoder:
    """An encoder in which every parameter matters: no scale is 1, no bias 0; gates, if any, are open."""
    generator = torch.Generator().manual_seed(seed)
    encoder = SpeechEncoder(EncoderConfig(**{**SHAPE, **changes}))
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("log_alpha"):
                parameter.copy_(4.6 + 0.01 * noise)
            elif parameter.dim() == 1 or name.endswith(("weight_g", "grep_a")):
                parameter.copy_(0.2 * noise + name.endswith(("norm.weight", "weight_g", "grep_a")))
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return encoder.eval()


def tone(seconds: float, seed: int, rate: int = 16000) -> np.ndarray:
    """(N,) float32: harmonics of a gliding pitch, with some noise."""
    random = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    pitch = random.uniform(90, 250) * (1 + 0.3 * np.sin(2 * np.pi * random.uniform(1, 3) * time))
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    wave = sum(np.sin(k * phase) / k for k in range(1, 6)) * 0.1 + random.normal(0, 0.01, len(time))
    return wave.astype(np.float32)


def write_speech(folder: Path, splits: dict[str, list[float]]) -> Path:
    """A fairseq data folder: audio of these lengths (seconds), and a manifest with root "." for each split."""
    for number, (split, lengths) in enumerate(splits.items()):
        (folder / split).mkdir(parents=True)
        names, sizes = [], []
        for i, seconds in enumerate(lengths):
            wave = tone(seconds, seed=1000 * number + i)
            soundfile.write(str(folder / split / f"{i}.wav"), wave, 16000)
            names.append(f"{split}/{i}.wav")
            sizes.append(len(wave))
        write_manifest(folder / f"{split}.tsv", ".", names, sizes)
    return folder


def make_task(data: Path, teacher: Any = None, **changes: Any) -> Any:
    """The distillation task, with a config like hydra's."""
    from omegaconf import OmegaConf

    from skill_fairseq.tasks.skill_distillation import SkillDistillationConfig, SkillDistillationTask

    fields = {"data": str(data), "teacher": None if teacher is None else str(teacher), "tpu": False, **changes}
    cfg = OmegaConf.merge(OmegaConf.structured(SkillDistillationConfig), fields)
    return SkillDistillationTask.setup_task(cfg)


def student_config(init_from: Any, **changes: Any) -> Any:
    """The model's part of a training config, dropout off."""
    from omegaconf import OmegaConf

    off = ("dropout", "attention_dropout", "activation_dropout", "dropout_input", "encoder_layerdrop")
    fields = {"_name": "skill_student", "init_from": str(init_from), "seed": 1}
    return OmegaConf.create({**fields, **dict.fromkeys(off, 0.0), **changes})


def make_criterion(task: Any, **fields: Any) -> Any:
    """The group criterion for a task that has built its model."""
    from omegaconf import OmegaConf

    return task.build_criterion(OmegaConf.create({"_name": "skill_group_kd", **fields}))


def waves(samples: int = 4000, batch: int = 2, seed: int = 0) -> Tensor:
    """(B, N) audio of equal length."""
    return torch.stack([torch.from_numpy(tone(samples / 16000, seed + i)) for i in range(batch)])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects tests marked nightly, unless -m or a test's own name selects them; puts the longest first, so
    that no process is left with them at the end."""
    items.sort(key=lambda item: "training" not in item.path.parts)
    if "nightly" in config.option.markexpr or any("::" in argument for argument in config.args):
        return
    nightly = [item for item in items if item.get_closest_marker("nightly")]
    if nightly:
        config.hook.pytest_deselected(items=nightly)
        items[:] = [item for item in items if not item.get_closest_marker("nightly")]


@pytest.fixture(scope="session")
def small() -> Any:
    """The functions and constants of this file."""
    return sys.modules[__name__]


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of ``SHAPE`` with random weights."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_encoder(random_encoder(), path, {"about": "random weights"})
    return path


@pytest.fixture(scope="session")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder: 24 training utterances of 0.3 to 1.2 s, 6 for validation."""
    lengths = np.random.default_rng(0).uniform(0.3, 1.2, 30).tolist()
    return write_speech(tmp_path_factory.mktemp("speech"), {"train": lengths[:24], "valid": lengths[24:]})
