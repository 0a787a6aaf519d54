"""A student's initialisation: copied parts and layers, its own shape, and seeded random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from messages import says
from omegaconf import OmegaConf
from oracle import RELATED, agrees, near, tensor, tensors
from torch import nn

from skill_fairseq.checkpoints import save_encoder
from skill_fairseq.checkpoints.fairseq_import import encoder_names
from skill_fairseq.models.student_init import make_student, student_shape
from skill_fairseq.modules.config import EncoderConfig, hubert_base, hubert_large, wavlm_base
from skill_fairseq.modules.encoder import SpeechEncoder
from skill_fairseq.modules.size import count_parameters, widths_of
from skill_fairseq.pruning.expected import full_parameters, smallest_widths
from skill_fairseq.pruning.shrink import shrink

DISTILHUBERT = {
    "init_parts": ["conv", "projection", "pos_conv", "layers"],
    "init_layers": [1, 2],
    "feature_layer_norm": False,
    "relative_position": False,
}
THIN = {
    "init_parts": [],
    "encoder_layers": 4,
    "encoder_embed_dim": 24,
    "encoder_ffn_embed_dim": 40,
    "encoder_attention_heads": 2,
    "conv_feature_layers": "[(8,10,5), (12,1,1)] + [(12,3,2)] * 4 + [(24,1,1)] + [(24,2,2)] * 2",
    "feature_linear": False,
}


def cfg(**fields: Any) -> Any:
    return OmegaConf.create({"init_from": "teacher.pt", "seed": 1, "pruning_units": [], **fields})


def parts_that_differ(student: SpeechEncoder, teacher: SpeechEncoder) -> set[str]:
    """The student's names whose tensors differ from the teacher's."""
    theirs = teacher.state_dict()
    return {k for k, v in student.state_dict().items() if k not in theirs or not torch.equal(v, theirs[k])}


def test_two_layers_of_a_relative_teacher(small: Any) -> None:
    """DistilHuBERT's start: everything is copied except the LayerNorm after the positional convolution."""
    teacher = small.random_encoder()
    student = make_student(teacher, cfg(**DISTILHUBERT))
    new = {"transformer.layer_norm.weight", "transformer.layer_norm.bias"}
    assert parts_that_differ(student, teacher) == new
    assert (student.transformer.layer_norm.weight == 1).all() and (student.transformer.layer_norm.bias == 0).all()
    assert student.config.encoder_layers == 2 and student.config.original_parameters is None
    names = set(student.state_dict())
    assert not [name for name in names if "relative" in name or "grep" in name or "projection.norm" in name]
    # The same by hand: the teacher without what the student lacks.
    teacher.feature_projection.norm = None
    teacher.transformer.relative_position = None
    teacher.transformer.layer_norm = nn.LayerNorm(32)
    with torch.no_grad():
        wanted, found = teacher(small.waves(), last_layer=2), student(small.waves())
    assert all(torch.equal(x, y) for x, y in zip(wanted.hidden_states, found.hidden_states))


def test_every_second_layer(small: Any) -> None:
    teacher = small.random_encoder(encoder_layers=6)
    student = make_student(teacher, cfg(init_layers=[2, 4, 6]))
    teacher.transformer.layers = nn.ModuleList(teacher.transformer.layers[i] for i in (1, 3, 5))
    source = small.waves()
    with torch.no_grad():
        wanted, found = teacher(source), student(source)
    assert len(found.hidden_states) == 4
    assert all(torch.equal(x, y) for x, y in zip(wanted.hidden_states, found.hidden_states))


def test_layers_repeat_and_null_starts_at_random(small: Any) -> None:
    teacher = small.random_encoder()
    student = make_student(teacher, cfg(init_layers=[3, 3, None, 1]))
    layers = [module.state_dict() for module in student.transformer.layers]
    theirs = [module.state_dict() for module in teacher.transformer.layers]

    def same(one: Any, other: Any) -> bool:
        return all(torch.equal(one[name], other[name]) for name in one)

    assert same(layers[0], theirs[2]) and same(layers[1], theirs[2]) and same(layers[3], theirs[0])
    weight = layers[2]["ffn.fc1.weight"]
    assert weight.std() == pytest.approx(0.02, rel=0.1) and abs(weight.mean()) < 0.002  # BERT's
    assert not parts_that_differ(student, teacher) - {k for k in student.state_dict() if "layers." in k}


def test_thin_student_shares_nothing_with_the_teacher(small: Any) -> None:
    teacher = small.random_encoder()
    student = make_student(teacher, cfg(**THIN))
    wanted = {**small.SHAPE, **{name: value for name, value in THIN.items() if name != "init_parts"}}
    assert student.config == EncoderConfig(**wanted)
    weights = {name: tensor for name, tensor in student.state_dict().items() if tensor.dim() > 1}
    assert weights and not any(torch.equal(v, teacher.state_dict().get(k, v + 1)) for k, v in weights.items())
    with torch.no_grad():
        assert student(small.waves()).x.shape == (2, 12, 24)


def test_convolutions_alone_and_another_width(small: Any) -> None:
    teacher = small.random_encoder()
    student = make_student(teacher, cfg(init_parts=["conv"], encoder_embed_dim=24, encoder_layers=2))
    names = {name for name in student.state_dict() if name.startswith("feature_extractor.")}
    assert len(names) == 10 and not names & parts_that_differ(student, teacher)
    assert set(student.state_dict()) - parts_that_differ(student, teacher) >= names


LOG_MEL = {
    "init_parts": ["pos_conv", "layer_norm", "layers"],
    "mel_bins": 40,
    "conv_feature_layers": "[(16,3,1), (24,3,2)]",
    "conv_bias": True,
}


def test_the_teachers_layers_behind_another_front_end(small: Any) -> None:
    teacher = small.random_encoder()
    student = make_student(teacher, cfg(**LOG_MEL))
    assert parts_that_differ(student, teacher) == {n for n in student.state_dict() if n.startswith("feature_")}
    wanted = {**teacher.config.to_dict(), **LOG_MEL, "conv_channels": [16, 24]}
    del wanted["init_parts"]
    assert student.config == EncoderConfig(**wanted)
    assert student(small.waves()).x.shape == teacher(small.waves()).x.shape


def test_random_weights_depend_on_the_seed_alone(small: Any) -> None:
    """So that ranks, and two runs, start equal; later random numbers do not change."""
    teacher = small.random_encoder()
    made = []
    for before, seed in ((1, 5), (2, 5), (1, 6)):
        torch.manual_seed(before)
        state = torch.get_rng_state()
        made.append(make_student(teacher, cfg(**{**THIN, "seed": seed})).state_dict())
        assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    assert not torch.equal(
        made[0]["transformer.layers.0.ffn.fc1.weight"], made[2]["transformer.layers.0.ffn.fc1.weight"]
    )


@pytest.mark.parametrize("start", [DISTILHUBERT, THIN], ids=["two_layers", "thin"])
def test_gates_refer_to_the_student_before_pruning(small: Any, start: dict[str, Any]) -> None:
    teacher = small.random_encoder()
    plain = make_student(teacher, cfg(**start))
    gated = make_student(teacher, cfg(**start, pruning_units=["conv", "heads", "ffn"]))
    assert full_parameters(gated.config) == plain.num_parameters() == gated.num_parameters()
    convs = len(gated.config.conv_feature_layers)
    gates = [name for name, _ in gated.named_gates() if name.startswith("feature_extractor.")]
    assert len(gates) == convs - (not gated.config.feature_linear)  # the model's width cannot be pruned
    small_one = shrink(gated, 0.5)
    assert small_one.num_parameters() == pytest.approx(0.5 * plain.num_parameters(), rel=0.01)
    for _, gate in gated.named_gates():
        gate.log_alpha.data.fill_(-9.0)
        if gate.num_units in (8, 12, 16, 24):  # of convolutions, one channel of which stays
            gate.log_alpha.data[0] = 9.0
    assert shrink(gated).num_parameters() == count_parameters(gated.config, smallest_widths(gated.config))


def test_saved_student_needs_no_teacher(small: Any, speech: Path, teacher_file: Path, tmp_path: Path) -> None:
    task = small.make_task(speech, teacher_file)
    fields = small.student_config(teacher_file, **THIN, pruning_units=["ffn"])
    model = task.build_model(fields)
    fields.init_from = str(tmp_path / "gone.pt")
    again = small.make_task(speech).build_model(fields, True)
    assert again.speech_encoder.config == model.speech_encoder.config
    again.load_state_dict(model.state_dict())


THIN_CONVS = "[(128,10,5), (256,1,1)] + [(256,3,2)] * 4 + [({0},1,1)] + [({0},2,2)] * 2"
THIN_12 = {"init_parts": [], "relative_position": False, "encoder_attention_heads": 12, "feature_linear": False}
PUBLISHED = {
    "DistilHuBERT": (DISTILHUBERT, 23_491_200),
    "12-L": (
        {**DISTILHUBERT, "init_parts": ["conv"], "init_layers": None, "encoder_layers": 12, "encoder_embed_dim": 384}
        | {"encoder_ffn_embed_dim": 1536, "encoder_attention_heads": 6},
        26_871_936,
    ),
    "3-L": ({**DISTILHUBERT, "init_layers": [1, 2, 3]}, 30_579_072),
    **{
        name: (
            {**THIN_12, "conv_feature_layers": THIN_CONVS.format(width), "encoder_embed_dim": width}
            | {"encoder_ffn_embed_dim": ffn},
            size,
        )
        for name, width, ffn, size in (
            ("MaskHuBERT", 480, 640, 22_202_464),
            ("STaR", 432, 976, 22_308_592),
            ("STaR-L", 480, 1024, 26_630_752),
        )
    },
}


@pytest.mark.parametrize("teacher", [hubert_base(), wavlm_base()], ids=["hubert", "wavlm"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str, teacher: EncoderConfig) -> None:
    fields, size = PUBLISHED[name]
    shape = student_shape(teacher, cfg(**fields))
    assert count_parameters(shape, widths_of(shape)) == size


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"init_layers": [1, 4]}, ("model.init_layers", "[1, 4]", "layer 4", "1 to 3", "null")),
        ({"init_layers": [0]}, ("model.init_layers", "layer 0", "1 to 3")),
        ({"init_layers": [1.5]}, ("model.init_layers", "1.5")),
        ({"init_layers": [True]}, ("model.init_layers", "True")),
        ({"init_layers": []}, ("model.init_layers", "[]", "such as")),
        ({"init_layers": 2}, ("model.init_layers", "2", "such as")),
        ({"mel_bins": 40, "conv_feature_layers": "[(16,3,2)]"}, ("model.conv_feature_layers", "conv", "init_parts")),
        ({"mel_bins": 40}, ("model.mel_bins", "40", "conv", "init_parts")),
        ({"mel_bins": 40, "init_parts": []}, ("model.conv_feature_layers", "strides", "mel_bins")),
        ({"init_layers": [1], "init_parts": ["conv"]}, ("model.init_layers", "model.init_parts", "encoder_layers")),
        ({"init_layers": [1, 2], "encoder_layers": 3}, ("model.encoder_layers: 3", "model.init_layers", "2 layers")),
        ({"init_parts": ["conv", "lstm"]}, ("model.init_parts", "lstm", "pos_conv")),
        ({"init_parts": "conv"}, ("model.init_parts", "conv", "list")),
        ({"encoder_layers": 2}, ("model.encoder_layers: 2", "has 3", "model.init_layers")),
        ({"encoder_embed_dim": 64}, ("model.encoder_embed_dim: 64", "has 32", "init_parts", "projection", "layers")),
        (
            {"init_parts": ["layers"], "encoder_embed_dim": 64},
            ("model.encoder_embed_dim: 64", "has 32", "['layers']", "init_parts"),
        ),
        ({"init_layers": [1], "encoder_ffn_embed_dim": 40}, ("model.encoder_ffn_embed_dim: 40", "has 48", "layers")),
        ({"init_parts": ["layers"], "layer_norm_first": True}, ("model.layer_norm_first: True", "has False")),
        (
            {"init_parts": ["projection"], "conv_feature_layers": "[(16,400,320)]"},
            ("model.conv_feature_layers", "16,400"),
        ),
        ({"init_parts": [], "encoder_embed_dim": 30}, ("model.encoder_attention_heads", "30")),
        ({"init_parts": [], "feature_linear": False}, ("model.feature_linear", "32", "conv_feature_layers")),
        ({"init_parts": [], "ffn_dims": [1, 2, 3]}, ("model.ffn_dims", "[1, 2, 3]", "remove")),
    ],
)
def test_what_cannot_be_is_refused(small: Any, fields: dict[str, Any], said: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=says(*said)):
        make_student(small.random_encoder(), cfg(**fields))


@pytest.mark.parametrize("fields", [{"init_layers": [1, 2]}, {"init_parts": ["conv"]}, {"relative_position": False}])
@pytest.mark.parametrize("gated", [True, False])
def test_pruned_encoders_are_copied_as_a_whole(
    small: Any, speech: Path, teacher_file: Path, tmp_path: Path, fields: dict[str, Any], gated: bool
) -> None:
    """A stage-1 checkpoint, which is shrunk at the start, and an already shrunk one."""
    encoder = small.random_encoder(pruning_units=["ffn"])
    for _, gate in encoder.named_gates():
        gate.log_alpha.data[:10] = -9.0
    path = tmp_path / "student.safetensors"
    save_encoder(encoder if gated else shrink(encoder), path, {})
    (name,) = fields
    with pytest.raises(ValueError, match=says(f"model.{name}", path, "pruned")):
        small.make_task(speech, teacher_file).build_model(small.student_config(path, **fields))


@pytest.mark.parametrize("name", ["init_layers", "init_parts"])
def test_nothing_is_copied_without_a_file(small: Any, speech: Path, teacher_file: Path, name: str) -> None:
    fields = small.student_config("", **{name: []})
    with pytest.raises(ValueError, match=says(f"model.{name}", "model.init_from", "nothing")):
        small.make_task(speech, teacher_file).build_model(fields)


def test_a_large_teacher_passes_its_norm_order_on() -> None:
    shape = student_shape(hubert_large(), cfg(init_layers=[8, 16, 24]))
    assert shape.layer_norm_first and shape.normalize and shape.encoder_embed_dim == 1024
    assert shape == hubert_large(encoder_layers=3)


@pytest.mark.parametrize("factor", [0.1, 0.0])
def test_feature_grad_mult_scales_the_gradients_of_the_convolutions_alone(
    small: Any, speech: Path, teacher_file: Path, factor: float
) -> None:
    task = small.make_task(speech, teacher_file)
    gradients = []
    for mult in (1.0, factor):
        fields = small.student_config(teacher_file, pruning_units=["conv"], feature_grad_mult=mult)
        torch.manual_seed(0)
        model = task.build_model(fields).train()
        model.set_num_updates(1)
        out = model(small.waves())
        sum(state.square().mean() for state in out["hidden_states"]).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        if name.startswith("speech_encoder.feature_extractor."):
            assert gradient.abs().max() > 0
            assert (name in gradients[1]) == (factor > 0)
            if factor:
                assert torch.allclose(gradients[1][name], factor * gradient, rtol=1e-6, atol=0)
        else:
            assert torch.equal(gradients[1][name], gradient), name


def test_distilhuberts_student_is_the_reference(small: Any, speech: Path, teacher_file: Path) -> None:
    """States and gradients for the student's shape, without a LayerNorm before the linear map, against s3prl's
    numbers."""
    case = RELATED["cases"]["distilhubert_student"]
    shape = {k: v for k, v in case["config"].items() if k != "feature_grad_mult"}
    start = {"init_parts": [], "feature_layer_norm": False, "relative_position": False}
    fields = small.student_config(teacher_file, **start, **shape, feature_grad_mult=0.1)
    model = small.make_task(speech, teacher_file).build_model(fields).eval()
    theirs, encoder = tensors(case["weights"]), model.speech_encoder
    name_of = encoder_names(encoder.config)
    names = {name: name_of(name) for name in encoder.state_dict()}
    missing, _ = encoder.load_state_dict({o: theirs.pop(n) for o, n in names.items() if n in theirs}, strict=False)
    assert not theirs and missing == ["feature_extractor.scale"]  # a number of ours, 1 from the start
    model.double()
    out = model(tensor(case["inputs"]["wave"]))
    assert agrees(out["hidden_states"][0], case["layer_0_before_positional_conv"])
    assert [agrees(state, summary) for state, summary in zip(out["hidden_states"][1:], case["layers"])] == [True] * 2
    out["hidden_states"][2].square().mean().backward()
    norms = {names[n]: p.grad.norm().item() for n, p in encoder.named_parameters() if names[n] in case["grad_norms"]}
    assert norms == near(case["grad_norms"], rel=1e-4)
