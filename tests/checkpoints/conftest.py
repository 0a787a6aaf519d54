"""Small foreign models with random weights, their hidden states, and their files in foreign formats."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from huggingface_models import CONV, POS_CONV, SAMPLES, SHAPE, huggingface, padded_batch, randomise  # noqa: F401
from torch import Tensor, nn


@pytest.fixture(scope="session")
def foreign() -> Any:
    """The functions of this file."""
    return sys.modules[__name__]


class States(NamedTuple):
    """Hidden states in SpeechEncoder's order, the output, and the frames' padding mask (True = padding)."""

    hidden: list[Tensor]
    x: Tensor
    padding: Tensor | None


def huggingface_states(model: Any, source: Tensor, padding: Tensor | None = None) -> States:
    """What transformers computes."""
    mask = None if padding is None else (~padding).long()
    with Recorder(model.feature_projection, *model.encoder.layers) as hidden, torch.no_grad():
        x = model(source, attention_mask=mask).last_hidden_state
        if mask is not None:
            padding = ~model._get_feature_vector_attention_mask(x.size(1), mask)
    return States(hidden, x, padding)


def fairseq(kind: str, style: str, **changes: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A random HubertModel, Wav2Vec2Model or Data2VecAudioModel of fairseq, and the ``cfg`` of its checkpoint."""
    from fairseq.data import Dictionary
    from fairseq.models.hubert.hubert import HubertConfig, HubertModel
    from fairseq.models.wav2vec import Wav2Vec2Config, Wav2Vec2Model
    from omegaconf import OmegaConf

    shape, large = SHAPE[style], style == "large"
    fields: dict[str, Any] = {
        "extractor_mode": "layer_norm" if large else "default",
        "conv_feature_layers": str(CONV[style]),
        "conv_bias": large,
        "encoder_layers": shape["layers"],
        "encoder_embed_dim": shape["dim"],
        "encoder_ffn_embed_dim": shape["ffn"],
        "encoder_attention_heads": shape["heads"],
        "activation_fn": "gelu",
        "layer_norm_first": large,
        "conv_pos": shape["conv_pos"],
        "conv_pos_groups": shape["groups"],
        **changes,
    }
    task = {"_name": "audio_pretraining", "data": ".", "normalize": large, "sample_rate": 16000}
    if kind == "hubert":
        task = {**task, "_name": "hubert_pretraining", "label_rate": 50.0, "labels": ["km"]}
        cfg = HubertConfig(label_rate=50, final_dim=8, **fields)
        model = HubertModel(cfg, argparse.Namespace(sample_rate=16000), [Dictionary()])
    elif kind == "data2vec_audio":
        from fairseq.examples.data2vec.models.data2vec_audio import Data2VecAudioConfig, Data2VecAudioModel

        depth, length = POS_CONV[style]
        layers = {"extractor_mode": "layer_norm", "pos_conv_depth": depth, "conv_pos": length}
        cfg = Data2VecAudioConfig(ema_anneal_end_step=10, max_update=10, **{**fields, **layers})
        model = Data2VecAudioModel(cfg)
        model.set_num_updates(0)  # makes the moving average, which is saved in the checkpoint
    else:
        cfg = Wav2Vec2Config(quantize_targets=True, latent_vars=4, final_dim=8, **fields)
        model = Wav2Vec2Model(cfg)
    written = OmegaConf.to_container(OmegaConf.structured(cfg), enum_to_str=True)
    written = {"model": {**written, "_name": kind}, "task": task, "criterion": None, "lr_scheduler": None}
    return randomise(model), written


def own_model(name: str, **changes: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A model of this package, and the ``cfg`` of its fairseq checkpoint."""
    from fairseq.data import Dictionary
    from fairseq.models import MODEL_DATACLASS_REGISTRY, MODEL_REGISTRY
    from omegaconf import OmegaConf

    fields = {
        "conv_feature_layers": "[(16,10,5)] + [(16,3,2)] * 4 + [(16,2,2)] * 2",
        "encoder_layers": 2,
        "encoder_embed_dim": 48,
        "encoder_ffn_embed_dim": 80,
        "encoder_attention_heads": 4,
        "conv_pos": 16,
        "conv_pos_groups": 4,
        "normalize": True,
        **({"seed": 1} if name == "skill_student" else {"label_rate": 50.0}),
        **changes,
    }
    cfg = MODEL_DATACLASS_REGISTRY[name](**fields)
    task = argparse.Namespace(cfg=argparse.Namespace(sample_rate=16000), dictionaries=[Dictionary()])
    model = MODEL_REGISTRY[name].build_model(cfg, task)
    written = OmegaConf.to_container(OmegaConf.structured(cfg), enum_to_str=True)
    task_cfg = {"normalize": True, "sample_rate": 16000}
    return model, {"model": {**written, "_name": name}, "task": task_cfg}


def fairseq_states(model: Any, source: Tensor, padding: Tensor | None = None) -> States:
    """What fairseq computes."""
    first = model.layer_norm if model.post_extract_proj is None else model.post_extract_proj
    with Recorder(first, *model.encoder.layers) as hidden, torch.no_grad():
        out = model.extract_features(source, padding, mask=False)
    x, padding = (out["x"], out["padding_mask"]) if isinstance(out, dict) else out
    # fairseq's layers work on (T, B, D), with T padded to an even number.
    hidden = [hidden[0]] + [h[: x.size(1)].transpose(0, 1) for h in hidden[1:]]
    return States(hidden, x, padding)


def save_fairseq(model: Any, cfg: Any, path: Path, **changes: Any) -> Path:
    """Writes a checkpoint with everything that fairseq's trainer saves."""
    from fairseq.data import Dictionary

    optimizer = torch.optim.Adam([nn.Parameter(torch.ones(3))])
    checkpoint = {
        "args": None,
        "cfg": cfg,
        "model": model if isinstance(model, dict) else model.state_dict(),
        "criterion": None,
        "optimizer_history": [
            {
                "criterion_name": "HubertCriterion",
                "optimizer_name": "FairseqAdam",
                "lr_scheduler_state": {"best": 3.5},
                "num_updates": 400,
            }
        ],
        "task_state": {"dictionaries": [Dictionary()]},
        "extra_state": {"metrics": [], "val_loss": np.float64(3.5), "epoch": np.int64(2)},
        "last_optimizer_state": optimizer.state_dict(),
        **changes,
    }
    torch.save(checkpoint, path)
    return path


def assert_teaches_and_learns(small: Any, data: Path, path: Path, folder: Path) -> None:
    """Checks that a file works as task.teacher and model.init_from, and that its student's checkpoint needs no
    teacher."""
    from skill_fairseq.checkpoints import load_encoder

    original = load_encoder(path)
    task = small.make_task(data, path, normalize=original.normalize)
    batch = {"net_input": {"source": torch.nn.functional.layer_norm(small.waves(), (4000,))}}
    source = batch["net_input"]["source"]
    groups = [[0, 1], [2], [len(original.transformer.layers)]]

    model = task.build_model(small.student_config(path, normalize=original.normalize))
    loss, _, _ = small.make_criterion(task, groups=groups)(model.eval(), batch)
    assert abs(loss.item() + 1) < 1e-5  # no distance, cosine 1

    half_open = dict.fromkeys(("conv_drop_rate", "head_drop_rate", "ffn_drop_rate"), 0.5)
    gates = {"pruning_units": ["conv", "heads", "ffn"], **half_open}
    cfg = small.student_config(path, normalize=original.normalize, **gates)
    model = task.build_model(cfg)
    loss, _, _ = small.make_criterion(task, groups=groups, target_sparsity=0.5)(model.train(), batch)
    loss.backward()
    gradients = [gate.grad.abs().sum() for _, gate in model.speech_encoder.named_gates()]
    assert sum(gradient > 0 for gradient in gradients) > len(gradients) / 2  # in a closed or wide open gate it is 0
    written = {"model": dict(cfg), "task": {"normalize": original.normalize}}
    saved = save_fairseq(model, written, folder / "student_of_it.pt")
    again = load_encoder(saved)
    assert again.config == model.speech_encoder.config
    assert again.config.replace(pruning_units=[], original_parameters=None) == original.config
    with torch.no_grad():
        assert torch.equal(again(source).x, model.eval().speech_encoder(source).x)


class Recorder:
    """Collects copies of modules' outputs, in call order, inside the block."""

    def __init__(self, *modules: nn.Module) -> None:
        self.modules = modules

    def __enter__(self) -> list[Tensor]:
        outputs: list[Tensor] = []

        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs.append((output[0] if isinstance(output, tuple) else output).clone())

        self.handles = [module.register_forward_hook(record) for module in self.modules]
        return outputs

    def __exit__(self, *error: Any) -> None:
        for handle in self.handles:
            handle.remove()


def assert_same_states(ours: Any, theirs: States, tolerance: float = 1e-5) -> None:
    """Checks that all hidden states, the output and frame counts agree outside the padding, relative to the state's
    size."""
    if theirs.padding is None:
        assert ours.padding_mask is None or not ours.padding_mask.any()
        counts = torch.ones(theirs.x.shape[:2], dtype=torch.bool)
    else:
        assert torch.equal(ours.padding_mask, theirs.padding)
        counts = ~theirs.padding
    assert len(ours.hidden_states) == len(theirs.hidden)
    for i, (a, b) in enumerate(zip([*ours.hidden_states, ours.x], [*theirs.hidden, theirs.x])):
        assert a.shape == b.shape
        assert b[counts].std() > 0.1  # random weights, but signals of usual size
        scale = max(1.0, float(b[counts].abs().max()))
        assert float((a - b)[counts].abs().max()) <= tolerance * scale, f"hidden state {i}"
