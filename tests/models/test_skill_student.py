"""The student: initialisation, gates, and interfaces."""

from __future__ import annotations

import math
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from messages import says
from omegaconf.errors import ConfigKeyError
from torch import Tensor

from skill_fairseq.checkpoints import load_encoder, save_encoder
from skill_fairseq.models.skill_student import SkillStudentModel
from skill_fairseq.models.student_init import initial_student
from skill_fairseq.models.wavlm import fairseq_fields
from skill_fairseq.modules import transformer
from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.pruning.costs import PARAMETERS
from skill_fairseq.pruning.expected import expected_sparsity
from skill_fairseq.pruning.shrink import shrink

UNITS = ["conv", "heads", "ffn", "attention_layers", "ffn_layers"]


@pytest.fixture
def build(small: Any, speech: Path, teacher_file: Path) -> Any:
    def make(init_from: Any = None, **changes: Any) -> SkillStudentModel:
        cfg = small.student_config(init_from or teacher_file, **changes)
        return small.make_task(speech, teacher_file).build_model(cfg)

    return make


def sampled(model: SkillStudentModel, update: int) -> list[Tensor]:
    """The sample of every gate in a forward at this update."""
    bank = model.speech_encoder.gates
    assert bank is not None
    drawn: list[Tensor] = []
    draw = bank.draw
    bank.draw = lambda **how: (made := draw(**how), drawn.append(made.z))[0]  # type: ignore[method-assign]
    model.train()
    model.set_num_updates(update)
    with torch.no_grad():
        model(torch.zeros(1, 400))
    del bank.draw
    assert len(drawn) == 1, "one draw a forward"
    return [drawn[0][gate.part] for gate in bank.gates]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other))


def test_starts_as_a_copy_of_the_teacher(build: Any, small: Any) -> None:
    model = build(pruning_units=UNITS).eval()
    teacher = small.random_encoder()
    own = model.speech_encoder.state_dict()
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(own[name], tensor), name
    assert set(own) - set(teacher.state_dict()) == {"gates.log_alpha", "gates.kept_override"}
    source = small.waves()
    with torch.no_grad():
        want, got = teacher(source), model(source)
        open_wide = build(pruning_units=UNITS)
        for _, gate in open_wide.speech_encoder.named_gates():
            gate.log_alpha.data.fill_(60.0)
        wide = open_wide.eval()(source)
    for x, y, z in zip(want.hidden_states, got["hidden_states"], wide["hidden_states"]):
        assert (x - y).norm() / x.norm() < 0.05  # each open gate has the value sigmoid(0.8 * 4.6 / beta) = 0.996
        assert (x - z).norm() / x.norm() < 1e-5
    assert len(got["hidden_states"]) == 4 and torch.equal(got["x"], got["hidden_states"][-1])


def test_expected_size_starts_just_below_the_teacher(build: Any, small: Any) -> None:
    model = build(pruning_units=["conv", "heads", "ffn"])
    expected = PARAMETERS(model.speech_encoder.config, model(small.waves())["expected_widths"])
    assert 0.99 < expected.item() / small.random_encoder().num_parameters() < 1 and expected.requires_grad
    assert build()(small.waves())["expected_widths"] is None


def test_shape_and_defaults_are_written_into_the_config(
    build: Any, small: Any, speech: Path, teacher_file: Path
) -> None:
    cfg = small.student_config(teacher_file, pruning_units=["ffn"])
    small.make_task(speech, teacher_file).build_model(cfg)
    again = small.make_task(speech).build_model(cfg, from_checkpoint=True)
    assert again.speech_encoder.config == EncoderConfig(
        **{**small.SHAPE, "pruning_units": ["ffn"], "original_parameters": small.random_encoder().num_parameters()}
    )
    assert cfg.ffn_drop_rate == 0.01 and cfg.encoder_layers == 3


def test_stage_1_checkpoint_is_shrunk_to_its_target(build: Any, small: Any, tmp_path: Path, caplog: Any) -> None:
    gated = small.random_encoder(pruning_units=["conv", "heads", "ffn"])
    generator = torch.Generator().manual_seed(0)
    for _, gate in gated.named_gates():
        gate.log_alpha.data.copy_(torch.randn(gate.num_units, generator=generator) * 2)
    path = tmp_path / "stage1.safetensors"
    save_encoder(gated, path, {"target_sparsity": 0.6})
    model = build(path)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert re.search(says("model.init_from", path, "target_sparsity: 0.6", "gates"), warning)
    expected = shrink(gated, 0.6)
    assert model.speech_encoder.config == expected.config and not list(model.speech_encoder.named_gates())
    assert abs(model.speech_encoder.num_parameters() / gated.num_parameters() - 0.4) < 2e-3
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.speech_encoder.state_dict()[name], tensor), name
    rebuilt = small.make_task(tmp_path).build_model(
        small.student_config("gone.pt", **fairseq_fields(expected.config)), True
    )
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    with pytest.raises(ValueError, match=says("model.init_from", path, "gates", "model.pruning_units")):
        build(path, pruning_units=["ffn"])
    caplog.clear()
    save_encoder(gated, path, {"target_sparsity": round(expected_sparsity(gated), 2)})
    build(path)
    save_encoder(gated, path, {})  # no target: as the gates round
    assert build(path).speech_encoder.config == shrink(gated).config
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_shrunk_student_can_be_gated_again(build: Any, small: Any, tmp_path: Path) -> None:
    gated = small.random_encoder(pruning_units=["ffn"])
    for _, gate in gated.named_gates():
        gate.log_alpha.data.copy_(torch.linspace(-3, 3, gate.num_units))
    save_encoder(shrink(gated), tmp_path / "small.safetensors")
    model = build(tmp_path / "small.safetensors", pruning_units=["heads", "ffn"])
    original = gated.num_parameters()
    assert model.speech_encoder.config.original_parameters == original
    expected = PARAMETERS(model.speech_encoder.config, model(small.waves())["expected_widths"])
    assert expected < model.speech_encoder.num_parameters() < original


@pytest.mark.parametrize("make", [lambda folder: folder / "gone.pt", lambda folder: folder])
def test_unusable_start_is_refused(build: Any, tmp_path: Path, make: Any) -> None:
    with pytest.raises((FileNotFoundError, ValueError), match=says("model.init_from", tmp_path)):
        build(make(tmp_path))


def test_unknown_pruning_unit_is_refused(build: Any) -> None:
    with pytest.raises(ValueError, match=says("model.pruning_units", "['neurons']")):
        build(pruning_units=["neurons"])


def test_gates_depend_on_seed_and_update_alone(build: Any) -> None:
    model, other = build(pruning_units=UNITS), build(pruning_units=UNITS)
    for (_, gate), (_, twin) in zip(model.speech_encoder.named_gates(), other.speech_encoder.named_gates()):
        twin.log_alpha.data.copy_(gate.log_alpha.data.fill_(0.0).clone())
    at_7 = sampled(model, 7)
    torch.manual_seed(123)
    torch.rand(1000)
    assert same(sampled(other, 7), at_7)
    assert not same(sampled(other, 8), at_7)
    assert same(sampled(model, 8), sampled(build_like(other, build, seed=1), 8))
    assert not same(sampled(model, 9), sampled(build_like(other, build, seed=2), 9))


def build_like(model: SkillStudentModel, build: Any, **changes: Any) -> SkillStudentModel:
    twin = build(pruning_units=UNITS, **changes)
    twin.load_state_dict(model.state_dict())
    return twin


def test_accumulated_batches_of_one_update_share_their_gates(build: Any) -> None:
    model = build(pruning_units=UNITS, ffn_drop_rate=0.5)
    first = sampled(model, 3)
    assert len(first) == len(list(model.speech_encoder.named_gates()))
    assert same(sampled(model, 3), first)  # set_num_updates comes before each of them
    assert not same(sampled(model, 4), first) and same(sampled(model, 3), first)


def _draw(rank: int, port: int, config: Any, queue: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(rank)
    found = {}
    for sampling in ("shared", "per_rank"):
        config.gate_sampling = sampling
        model = SkillStudentModel(config)
        for _, gate in model.speech_encoder.named_gates():
            gate.log_alpha.data.fill_(0.0)
        found[sampling] = torch.cat(sampled(model, 5)).tolist()
    queue.put((rank, found))
    torch.distributed.destroy_process_group()


def test_ranks_share_their_gates_or_draw_their_own(build: Any) -> None:
    cfg = build(pruning_units=["heads", "ffn"]).cfg
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("fork")
    queue = context.Queue()
    ranks = [context.Process(target=_draw, args=(rank, port, cfg, queue)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    drawn = dict(queue.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join(60)
    assert drawn[0]["shared"] == drawn[1]["shared"]
    assert drawn[0]["per_rank"] != drawn[1]["per_rank"]
    assert drawn[0]["per_rank"] == drawn[0]["shared"]  # rank 0's own are the shared ones


def test_every_gate_has_a_kind_and_the_count_of_its_units(build: Any) -> None:
    model = build(pruning_units=UNITS)
    units: dict[str, list[int]] = {}
    for _, gate in model.speech_encoder.named_gates():
        units.setdefault(gate.unit, []).append(gate.num_units)
    assert units == {
        "conv": [16] * 7,
        "heads": [4] * 3,
        "ffn": [48] * 3,
        "attention_layers": [1] * 3,
        "ffn_layers": [1] * 3,
    }


def test_drop_rates(build: Any) -> None:
    """DPHuBERT's start: all open except the FFN units, which are half closed."""
    rates = {"conv": 0.01, "heads": 0.02, "ffn": 0.5, "attention_layers": 0.03, "ffn_layers": 0.03}
    model = build(
        pruning_units=UNITS, conv_drop_rate=0.01, head_drop_rate=0.02, ffn_drop_rate=0.5, layer_drop_rate=0.03
    )
    for _, gate in model.speech_encoder.named_gates():
        rate = rates[gate.unit]
        centre = math.log((1 - rate) / rate)
        assert (gate.log_alpha - centre).abs().max() < 0.06  # drawn with a standard deviation of 0.01
        assert gate.num_units == 1 or gate.log_alpha.std() > 0.001
    default = build(pruning_units=UNITS)
    assert all(abs(gate.log_alpha.mean() - 4.595) < 0.04 for _, gate in default.speech_encoder.named_gates())


def test_training_state_is_tagged_for_the_optimizer(build: Any) -> None:
    model = build(pruning_units=UNITS)
    tags = {name: getattr(p, "param_group", "default") for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, tag in tags.items() if tag == "gates"} == {n for n in tags if n.endswith("log_alpha")}
    assert set(tags.values()) == {"default", "gates"} and "mask_emb" not in tags


@pytest.mark.parametrize("convert", ["half", "bfloat16"])
def test_lower_precision_leaves_gates_alone(build: Any, convert: str) -> None:
    model = build(pruning_units=UNITS)
    before = {name: p.clone() for name, p in model.named_parameters() if name.endswith("log_alpha")}
    getattr(model, convert)()
    for name, parameter in model.named_parameters():
        if name in before:
            assert parameter.dtype == torch.float32 and torch.equal(parameter, before[name])
            assert parameter.param_group == "gates"
        else:
            assert parameter.dtype != torch.float32
    model.train()
    assert all(gate().dtype == torch.float32 for _, gate in model.speech_encoder.named_gates())


def test_extract_features(build: Any, small: Any, teacher_file: Path) -> None:
    model = build().eval()
    source = small.waves(6000)
    padding = torch.zeros(2, 6000, dtype=torch.bool)
    padding[1, 4000:] = True
    with torch.no_grad():
        want = load_encoder(teacher_file)(source, padding)
        x, mask = model.extract_features(source, padding)
        assert torch.equal(x, want.x) and torch.equal(mask, want.padding_mask)
        for layer in (1, 2, 3):
            x, _ = model.extract_features(source, padding, output_layer=layer)
            assert torch.equal(x, want.hidden_states[layer])
        conv, _ = model.extract_features(source, padding, ret_conv=True)
        assert torch.equal(conv, want.hidden_states[0])
        assert model.extract_features(source)[1] is None


def test_masking_for_fine_tuning(small: Any, speech: Path) -> None:
    shape = fairseq_fields(small.random_encoder().config)

    def build(**changes: Any) -> SkillStudentModel:
        """Built from a checkpoint's config, like in fairseq's fine-tuning."""
        torch.manual_seed(0)
        return small.make_task(speech).build_model(small.student_config("gone.pt", **shape, **changes), True)

    model = build(mask_prob=0.8, mask_length=3, mask_channel_prob=0.0)
    model.remove_pretraining_modules()
    source = small.waves(8000)
    plain, _ = model.extract_features(source, mask=False)
    masked, _ = model.extract_features(source, mask=True)
    assert not torch.equal(plain, masked)
    masked.sum().backward()
    assert model.mask_emb.grad is not None and model.mask_emb.grad.abs().sum() > 0
    unmasked, _ = build(mask_prob=0.0, mask_channel_prob=0.0).extract_features(source, mask=True)
    assert torch.equal(plain, unmasked)


def test_initial_student_of_an_ungated_config_is_the_file_itself(small: Any, teacher_file: Path) -> None:
    from omegaconf import OmegaConf

    cfg = OmegaConf.create({"init_from": str(teacher_file), "pruning_units": []})
    encoder = initial_student(cfg)
    assert encoder.config == small.random_encoder().config
    for name, tensor in small.random_encoder().state_dict().items():
        assert torch.equal(encoder.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("feature_grad_mult", -0.1, "at least 0"),
        ("feature_grad_mult", math.inf, "at least 0"),
        ("mask_prob", 0.3, "does nothing"),
        ("conv_drop_rate", 0.0, "between 0 and 1"),
        ("conv_drop_rate", 1.0, "between 0 and 1"),
        ("ffn_drop_rate", -0.5, "between 0 and 1"),
        ("head_drop_rate", float("nan"), "between 0 and 1"),
        ("layer_drop_rate", 2.0, "between 0 and 1"),
        ("dropout", 1.0, "below 1"),
        ("encoder_layerdrop", -0.1, "below 1"),
        ("encoder_layers", 4, "has 3"),
        ("encoder_embed_dim", 64, "has 32"),
        ("conv_feature_layers", "[(16,10,5)]", "remove"),
        ("normalize", True, "has False"),
        ("heads", [[0], [0], [0]], "remove"),
    ],
)
def test_fields_that_do_nothing_or_cannot_be_are_named(build: Any, field: str, value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=says(f"model.{field}", value, said)):
        build(**{field: value})


def test_a_shape_that_is_the_files_may_be_written_out(build: Any, small: Any) -> None:
    shape = fairseq_fields(small.random_encoder().config)
    del shape["pruning_units"]
    spaced = shape["conv_feature_layers"].replace(",", ", ")
    assert build(**{**shape, "conv_feature_layers": spaced}).speech_encoder.config == small.random_encoder().config


FOREIGN = ["layer_type", "required_seq_len_multiple", "attn_type", "pos_enc_type", "depthwise_conv_kernel_size"]


@pytest.mark.parametrize("field", [*FOREIGN, "label_rate", "final_dim", "dropout_features", "logit_temp"])
def test_the_student_has_no_fields_of_other_models(build: Any, small: Any, speech: Path, field: str) -> None:
    """A run that sets one is refused by name; in a checkpoint of an earlier version it is ignored."""
    value = "conformer" if field in ("layer_type", "attn_type", "pos_enc_type") else 3
    with pytest.raises(ConfigKeyError, match=field):
        build(**{field: value})
    shape = fairseq_fields(small.random_encoder().config)
    old = small.student_config("gone.pt", **shape, **{field: value})
    assert small.make_task(speech).build_model(old, True).speech_encoder.config == small.random_encoder().config


@pytest.mark.parametrize("stage", [1, 2])
def test_checkpoint_activations_in_either_stage(
    build: Any, small: Any, tmp_path: Path, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, units = None, UNITS
    if stage == 2:
        start, units = tmp_path / "shrunk.safetensors", []
        save_encoder(small.random_encoder(heads=[[0, 2], [], [1]], ffn_dims=[5, 48, 0]), start, {})
    drop = {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1}
    again: list[int] = []
    checkpoint = transformer.checkpoint
    monkeypatch.setattr(transformer, "checkpoint", lambda *a, **k: (again.append(1), checkpoint(*a, **k))[1])
    gradients = []
    for on in (False, True):
        torch.manual_seed(0)
        model = build(start, pruning_units=units, checkpoint_activations=on, ffn_drop_rate=0.5, **drop).train()
        assert len(again) == 0
        torch.manual_seed(1)
        model.set_num_updates(3)
        out = model(small.waves())
        sum(state.square().mean() for state in out["hidden_states"]).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(again) == 3  # layers
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
