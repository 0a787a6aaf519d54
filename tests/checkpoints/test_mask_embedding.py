"""The mask embedding of pre-training is kept from every kind of file and through every export."""

from __future__ import annotations

import logging

import pytest
import torch

from skill_fairseq.checkpoints import load_encoder, save_encoder
from skill_fairseq.cli.export import main as export
from skill_fairseq.modules.masking import HideFrames
from skill_fairseq.pruning.shrink import shrink
from tests.conftest import random_encoder

FAIRSEQ = ("hubert", "wav2vec2", "data2vec_audio")
MASKED = {"criterion": {"objectives": {"a": {"_name": "layers", "mask_prob": 0.4}}}}


def masked(encoder, source, mask):
    with torch.no_grad():
        return encoder(source, transform=HideFrames(mask, encoder.mask_embedding)).x


@pytest.mark.parametrize("kind", ["wavlm", "hubert", "wav2vec2", "data2vec-audio"])
def test_masked_frames_are_those_of_transformers(foreign, kind, tmp_path):
    """With the same mask, outputs are equal, also from a stock folder of skill-export."""
    model = foreign.huggingface(kind, "base").eval()
    model.config.mask_time_prob = 0.05
    if not hasattr(model, "masked_spec_embed"):
        model.masked_spec_embed = torch.nn.Parameter(torch.zeros(model.config.hidden_size))
    model.masked_spec_embed.data.normal_(generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path / "model")
    encoder, (source, _) = load_encoder(tmp_path / "model"), foreign.padded_batch()
    mask = torch.rand(len(source), encoder.config.num_frames(source.size(1)), generator=torch.Generator()) < 0.5
    with torch.no_grad():
        wanted = model(source, mask_time_indices=mask).last_hidden_state
    assert (masked(encoder, source, mask) - wanted).abs().max() < 1e-4
    assert (encoder(source).x - wanted).abs().max() > 0.1
    assert export([str(tmp_path / "model"), str(tmp_path / "out"), "--to", "huggingface"]) == 0
    again = type(model).from_pretrained(tmp_path / "out")
    assert torch.equal(again.masked_spec_embed, model.masked_spec_embed)
    with torch.no_grad():  # masking is off by default, also in training
        assert torch.equal(*(each.masked_spec_embed for each in (again, model)))
        again.train()
        hidden = torch.randn(1, 50, model.config.hidden_size)
        assert torch.equal(again._mask_hidden_states(hidden.clone()), hidden)


@pytest.mark.parametrize("kind", FAIRSEQ)
def test_of_fairseq_fine_tuned_or_not_and_of_s3prl_and_microsoft(foreign, kind, tmp_path):
    model, cfg = foreign.fairseq(kind, "base")
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "_ema"}
    wanted = state["mask_emb"]
    assert wanted.unique().numel() > 1
    paths = [foreign.save_fairseq(state, cfg, tmp_path / "model.pt")]
    inner = {f"w2v_encoder.w2v_model.{name}": tensor for name, tensor in state.items()}
    tuned = {"model": {"_name": "hubert_ctc", "w2v_args": cfg, "w2v_path": "x.pt"}, "task": {"normalize": False}}
    paths.append(foreign.save_fairseq(inner, tuned, tmp_path / "tuned.pt"))
    paths.append(tmp_path / "s3prl.pt")
    torch.save({"task_cfg": cfg["task"], "model_cfg": cfg["model"], "model_weight": state}, paths[-1])
    if kind == "hubert":  # shape and names are those of WavLM without relative positions
        paths.append(tmp_path / "wavlm.pt")
        torch.save({"cfg": {**cfg["model"], "normalize": False}, "model": state}, paths[-1])
    for path in paths:
        encoder = load_encoder(path)
        assert torch.equal(encoder.mask_embedding, wanted), path
        assert "mask_embedding" not in encoder.state_dict()


def test_of_torchaudio(foreign, tmp_path):
    transformed = random_encoder(relative_position=False)
    state = {}
    from skill_fairseq.checkpoints.torchaudio_import import _from_transformers, _transformers_name

    for name, tensor in transformed.state_dict().items():
        state["wav2vec2." + _from_transformers(_transformers_name(name))] = tensor
    state.pop("wav2vec2.feature_extractor.dummy_weight", None)
    state["mask_generator.mask_embedding"] = torch.arange(32.0)
    torch.save({"state_dict": state, "config": {"encoder_num_heads": 4}}, tmp_path / "model.pth")
    assert torch.equal(load_encoder(tmp_path / "model.pth").mask_embedding, torch.arange(32.0))


def test_a_students_own_counts_where_it_was_trained(foreign, tmp_path):
    model, cfg = foreign.own_model("skill_student")
    with torch.no_grad():
        model.mask_emb.copy_(torch.arange(48.0))
    wanted = model.mask_emb.detach()
    plain = foreign.save_fairseq(model, cfg, tmp_path / "plain.pt")
    assert load_encoder(plain).mask_embedding is None
    objective = foreign.save_fairseq(model, {**cfg, **MASKED}, tmp_path / "masked.pt")
    assert torch.equal(load_encoder(objective).mask_embedding, wanted)
    inner = {f"w2v_encoder.w2v_model.{name}": tensor for name, tensor in model.state_dict().items()}
    for run, apply_mask, kept in ((cfg, True, True), (cfg, False, False), ({**cfg, **MASKED}, False, True)):
        outer = {"_name": "hubert_ctc", "w2v_args": run, "w2v_path": "x.pt", "apply_mask": apply_mask}
        path = foreign.save_fairseq(inner, {"model": outer, "task": {"normalize": True}}, tmp_path / "tuned.pt")
        assert (load_encoder(path).mask_embedding is not None) is kept
    model, cfg = foreign.own_model("wavlm")
    path = foreign.save_fairseq(model, cfg, tmp_path / "wavlm.pt")
    assert torch.equal(load_encoder(path).mask_embedding, model.mask_emb.detach())


@pytest.mark.parametrize("pruned", [False, True])
def test_exports_hold_it(pruned, tmp_path):
    """Files of encoders without one do not change."""
    units = ["ffn"] if pruned else []
    encoder, without = (random_encoder(pruning_units=units) for _ in range(2))
    encoder.mask_embedding = torch.linspace(-1, 1, 32)
    if pruned:
        encoder, without = (shrink(each, 0.1) for each in (encoder, without))
        assert torch.equal(encoder.mask_embedding, torch.linspace(-1, 1, 32))
    for each, name in ((encoder, "with"), (without, "without")):
        save_encoder(each, tmp_path / f"{name}.safetensors", dtype="float32")
        for to in ("huggingface", "s3prl"):
            assert export([str(tmp_path / f"{name}.safetensors"), str(tmp_path / f"{name}_{to}"), "--to", to]) == 0
    for file in (".safetensors", "_huggingface", "_s3prl"):
        found = load_encoder(tmp_path / f"with{file}")
        assert torch.equal(found.mask_embedding, encoder.mask_embedding), file
        assert found.num_parameters() == encoder.num_parameters()
        assert load_encoder(tmp_path / f"without{file}").mask_embedding is None
    save_encoder(encoder, tmp_path / "half.safetensors", dtype="float16")
    half = load_encoder(tmp_path / "half.safetensors").mask_embedding
    assert half.dtype == torch.float32 and torch.equal(half, encoder.mask_embedding.half().float())


@pytest.mark.parametrize("broken", [torch.ones(5), torch.full((32,), float("nan"))])
def test_one_that_is_not_usable_is_left_out(broken, tmp_path, caplog):
    """Most encoders are used without it."""
    encoder = random_encoder()
    encoder.mask_embedding = broken
    save_encoder(encoder, tmp_path / "e.safetensors")
    with caplog.at_level(logging.WARNING):
        assert load_encoder(tmp_path / "e.safetensors").mask_embedding is None
    assert "mask_embedding" in caplog.text and "32 finite" in caplog.text
