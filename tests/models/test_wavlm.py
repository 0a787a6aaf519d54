"""The model "wavlm" under fairseq's stock hubert_pretraining task and criterion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairseq.criterions import build_criterion
from fairseq.tasks.hubert_pretraining import HubertPretrainingConfig, HubertPretrainingTask
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError

from skill_fairseq.models.wavlm import WavLMModel
from skill_fairseq.modules import transformer

CLASSES = 7


@pytest.fixture
def pretraining(small: Any, speech: Path, tmp_path: Path) -> Any:
    """Builds (task, model, criterion, batch) with random labels, 50 per second."""
    labels = tmp_path / "labels"
    labels.mkdir()
    (labels / "dict.km.txt").write_text("".join(f"{i} 1\n" for i in range(CLASSES)))
    root, *lines = (speech / "train.tsv").read_text().splitlines()
    (tmp_path / "train.tsv").write_text("\n".join([str(speech / root), *lines]) + "\n")
    generator = torch.Generator().manual_seed(0)
    rows = []
    for line in lines:
        frames = (int(line.split("\t")[1]) - 80) // 320
        rows.append(" ".join(str(int(i)) for i in torch.randint(CLASSES, (frames,), generator=generator)))
    (labels / "train.km").write_text("\n".join(rows) + "\n")

    def make(**changes: Any) -> tuple:
        fields = {
            "data": str(tmp_path),
            "label_dir": str(labels),
            "labels": ["km"],
            "label_rate": 50.0,
            "sample_rate": 16000,
            "max_sample_size": 16000,
            "min_sample_size": 2000,
            "pad_audio": False,
            "random_crop": True,
            "normalize": False,
        }
        cfg = OmegaConf.merge(OmegaConf.structured(HubertPretrainingConfig), fields)
        task = HubertPretrainingTask.setup_task(cfg)
        off = ("dropout", "attention_dropout", "activation_dropout", "dropout_input", "dropout_features")
        model = task.build_model(
            OmegaConf.create(
                {
                    "_name": "wavlm",
                    **small.SHAPE,
                    **dict.fromkeys(off, 0.0),
                    "encoder_layerdrop": 0.0,
                    "label_rate": 50.0,
                    "normalize": False,
                    "final_dim": 16,
                    "untie_final_proj": True,
                    "mask_prob": 0.65,
                    "mask_length": 3,
                    **changes,
                }
            )
        )
        criterion = build_criterion(
            OmegaConf.create({"_name": "hubert", "pred_masked_weight": 1.0, "pred_nomask_weight": 0.0}), task
        )
        task.load_dataset("train")
        dataset = task.dataset("train")
        batch = dataset.collater([dataset[i] for i in range(6)])
        return task, model, criterion, batch

    return make


@pytest.mark.parametrize("style", ["base", "large"])
def test_learns_masked_prediction(pretraining: Any, small: Any, style: str) -> None:
    """A few updates on one batch lower its loss, and every parameter is trained."""
    torch.manual_seed(0)
    task, model, criterion, batch = pretraining(**(small.LARGE_STYLE if style == "large" else {}))
    assert type(model) is WavLMModel
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for update in range(12):
        model.train()
        model.set_num_updates(update)
        loss, sample_size, log = criterion(model, batch)
        assert torch.isfinite(loss)
        losses.append(log["loss_m_0"] / sample_size)
        optimizer.zero_grad()
        loss.backward()
        assert not [name for name, p in model.named_parameters() if p.grad is None]
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


def test_predictions_are_made_for_masked_frames_alone(pretraining: Any) -> None:
    _, model, _, batch = pretraining(skip_nomask=True)
    torch.manual_seed(0)
    out = model(target_list=batch["target_list"], **batch["net_input"])
    (logits,), (targets,) = model.get_logits(out, True), model.get_targets(out, True)
    frames = batch["net_input"]["padding_mask"].size(0) * model.speech_encoder.config.num_frames(
        batch["net_input"]["source"].size(1)
    )
    assert logits.shape == (len(targets), CLASSES + 4 + 1)  # fairseq's special symbols, and the right one first
    assert 0.3 * frames < len(targets) < 0.95 * frames
    assert model.get_logits(out, False) == []


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0])
def test_feature_grad_mult_scales_the_gradient_of_the_convolutions(pretraining: Any, small: Any, scale: float) -> None:
    gradients = []
    for factor in (1.0, scale):
        torch.manual_seed(0)
        _, model, _, _ = pretraining(feature_grad_mult=factor)
        model.double()  # GroupNorm: small gradients from large terms, whose float32 digits depend on the processor
        features = model.forward_features(small.waves().double())
        if features.requires_grad:
            features.square().sum().backward()
        weight = model.speech_encoder.feature_extractor.layers[0].conv.weight
        gradients.append(torch.zeros_like(weight) if weight.grad is None else weight.grad)
    assert torch.allclose(gradients[1], scale * gradients[0], rtol=1e-6)


def test_features_are_the_encoders(pretraining: Any, small: Any) -> None:
    _, model, _, _ = pretraining()
    model.eval()
    source = small.waves(6000)
    padding = torch.zeros(2, 6000, dtype=torch.bool)
    padding[1, 4000:] = True
    with torch.no_grad():
        want = model.speech_encoder(source, padding)
        for layer in (None, 1, 2, 3):
            x, mask = model.extract_features(source, padding, mask=False, output_layer=layer)
            assert torch.allclose(x, want.x if layer is None else want.hidden_states[layer], atol=1e-6)
            assert torch.equal(mask, want.padding_mask)


def test_without_relative_position_it_is_hubert(pretraining: Any) -> None:
    """Only the table and the gates are missing. (The importers' tests show that the rest computes what HuBERT does.)"""
    _, wavlm, _, _ = pretraining()
    _, hubert, _, _ = pretraining(relative_position=False)
    extra = set(wavlm.state_dict()) - set(hubert.state_dict())
    assert extra and all("relative_position" in name or "position_gate" in name for name in extra)
    assert set(hubert.state_dict()) < set(wavlm.state_dict())


def test_fields_of_conformers_and_padding_are_refused_in_training_alone(pretraining: Any, small: Any) -> None:
    for name, value in (("layer_type", "conformer"), ("required_seq_len_multiple", 1), ("fp16", True)):
        with pytest.raises(ConfigKeyError, match=name):
            pretraining(**{name: value})
    task, model, _, _ = pretraining()
    cfg = OmegaConf.create(OmegaConf.to_container(model.cfg, enum_to_str=True))
    old = OmegaConf.merge(cfg, {"_name": "wavlm", "layer_type": "transformer", "latent_temp": [2, 0.5, 0.999995]})
    assert task.build_model(old, from_checkpoint=True).speech_encoder.config == model.speech_encoder.config


def test_the_sample_rate_is_the_tasks(pretraining: Any) -> None:
    _, model, _, _ = pretraining()
    cfg = model.cfg
    task_cfg = OmegaConf.create({"sample_rate": 8000})
    telephone = type(model)(cfg, task_cfg, [None])
    assert telephone.speech_encoder.config.sample_rate == 8000
    assert telephone.feat2tar_ratio == 2 * model.feat2tar_ratio


def test_checkpoint_activations(pretraining: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    again: list[int] = []
    checkpoint = transformer.checkpoint
    monkeypatch.setattr(transformer, "checkpoint", lambda *a, **k: (again.append(1), checkpoint(*a, **k))[1])
    gradients = []
    for on in (False, True):
        torch.manual_seed(0)
        np.random.seed(0)
        _, model, criterion, batch = pretraining(checkpoint_activations=on, dropout=0.1, attention_dropout=0.1)
        torch.manual_seed(1)
        np.random.seed(1)
        loss, _, _ = criterion(model.train(), batch)
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert len(again) == 3  # layers
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
