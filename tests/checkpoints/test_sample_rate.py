"""An encoder's sample rate is the one that it was trained at."""

from __future__ import annotations

import pytest

from skill_fairseq.checkpoints import load_encoder


@pytest.mark.parametrize("kind", ["hubert", "wav2vec2"])
def test_it_is_read_from_the_task_of_a_fairseq_checkpoint(foreign, kind, tmp_path):
    model, cfg = foreign.fairseq(kind, "base")
    assert load_encoder(foreign.save_fairseq(model, cfg, tmp_path / "usual.pt")).config.sample_rate == 16000
    cfg["task"]["sample_rate"] = 8000
    assert load_encoder(foreign.save_fairseq(model, cfg, tmp_path / "telephone.pt")).config.sample_rate == 8000
    del cfg["task"]["sample_rate"]
    assert load_encoder(foreign.save_fairseq(model, cfg, tmp_path / "unsaid.pt")).config.sample_rate == 16000


@pytest.mark.parametrize("name", ["wavlm", "skill_student"])
def test_it_is_read_from_checkpoints_of_this_package(foreign, name, tmp_path):
    model, cfg = foreign.own_model(name)
    cfg["task"]["sample_rate"] = 8000  # older checkpoints have nothing else
    assert load_encoder(foreign.save_fairseq(model, cfg, tmp_path / "old.pt")).config.sample_rate == 8000
    cfg["model"]["sample_rate"], cfg["task"]["sample_rate"] = 8000, 16000
    assert load_encoder(foreign.save_fairseq(model, cfg, tmp_path / "new.pt")).config.sample_rate == 8000
