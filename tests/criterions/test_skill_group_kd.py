"""The group criterion: its value against a computation by hand, its gradients, and refusals."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from messages import says
from omegaconf import OmegaConf
from torch import Tensor

from skill_fairseq.checkpoints import save_encoder
from skill_fairseq.criterions import skill_group_kd
from skill_fairseq.pruning.costs import MacCost
from skill_fairseq.pruning.exact import ExactConstraint
from skill_fairseq.pruning.expected import expected_parameters, expected_sparsity, full_parameters

GROUPS = [[0], [1, 2], [3]]
UNITS = ["conv", "heads", "ffn"]


@pytest.fixture
def build(small: Any, speech: Path, teacher_file: Path) -> Any:
    """Builds (task, model, criterion); the student's weights differ from the teacher's."""

    def make(units: list[str] | None = None, student: Any = None, teacher: Any = None, **fields: Any) -> tuple:
        task = small.make_task(speech, teacher or teacher_file)
        model = task.build_model(small.student_config(student or teacher_file, pruning_units=units or []))
        if student is None:
            generator = torch.Generator().manual_seed(3)
            for name, parameter in model.speech_encoder.named_parameters():
                if "log_alpha" not in name:
                    parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        criterion = small.make_criterion(task, **{"groups": GROUPS, **fields})
        return task, model, criterion

    return make


def batch(source: Tensor, padding_mask: Tensor | None = None) -> dict[str, Any]:
    return {"net_input": {"source": source, **({} if padding_mask is None else {"padding_mask": padding_mask})}}


def means(result: tuple) -> dict[str, Any]:
    """Logged values of a forward, per frame."""
    counted = ("frames", "nsentences", "ntokens", "audio_seconds")
    return {n: v if n in counted else float(v) / result[2]["frames"] for n, v in result[2].items()}


def states(encoder: Any, source: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return encoder(source).hidden_states


def test_value_by_hand(build: Any, small: Any) -> None:
    task, model, criterion = build()
    source = small.waves(batch=3)
    result = loss, weight, _ = criterion(model.eval(), batch(source))
    log = means(result)
    student, teacher = states(model.speech_encoder, source), states(task.teachers[0].encoder, source)
    expected = 0.0
    for index, group in enumerate(GROUPS):
        s = sum(student[i].double() for i in group) / len(group)
        t = sum(teacher[i].double() for i in group) / len(group)
        l1 = (s - t).abs().mean()
        cos = ((s * t).sum(-1) / (s.norm(dim=-1) * t.norm(dim=-1))).mean()
        assert float(log[f"l1_g{index}"]) == pytest.approx(l1.item(), rel=1e-5)
        assert float(log[f"cos_g{index}"]) == pytest.approx(cos.item(), rel=1e-5)
        expected += (l1 - cos).item() / len(GROUPS)
    for value in (loss.item(), log["loss"], log["distillation_loss"]):
        assert value == pytest.approx(expected, rel=1e-5)
    assert weight == 1 and log["frames"] == 3 * student[0].size(1)
    assert (log["nsentences"], log["ntokens"], log["audio_seconds"]) == (3, 12000, 0.75)


def test_a_perfect_student_has_no_distance(build: Any, small: Any, teacher_file: Path) -> None:
    _, model, criterion = build(student=teacher_file)
    result = criterion(model.eval(), batch(small.waves()))
    assert result[0].item() == pytest.approx(-1.0, abs=1e-6) and means(result)["l1_g1"] < 1e-6


def test_weights_and_kinds_of_the_loss(build: Any, small: Any) -> None:
    source = small.waves()
    _, model, plain = build()
    log = means(plain(model.eval(), batch(source)))
    l1, cos = ([log[f"{part}_g{i}"] for i in range(3)] for part in ("l1", "cos"))
    weights = [0.5, 2.0, 0.0]
    _, model, weighted = build(group_weights=weights, l1_weight=0.3, cos_weight=0.7)
    loss = weighted(model.eval(), batch(source))[0].item()
    assert loss == pytest.approx(sum(w * (0.3 * a - 0.7 * c) for w, a, c in zip(weights, l1, cos)), rel=1e-5)
    task, model, log_sig = build(cos_type="log_sig", l1_weight=0.0)
    loss = log_sig(model.eval(), batch(source))[0].item()
    student, teacher = states(model.speech_encoder, source), states(task.teachers[0].encoder, source)
    expected = 0.0
    for group in GROUPS:
        pair = [sum(hidden[i] for i in group) / len(group) for hidden in (student, teacher)]
        expected += -F.cosine_similarity(*pair, dim=-1).sigmoid().log().mean().item() / 3
    assert loss == pytest.approx(expected, rel=1e-5)


def test_states_can_be_normalised_before_averaging(build: Any, small: Any) -> None:
    source = small.waves()
    task, model, criterion = build(normalize_states=True, cos_weight=0.0)
    loss = criterion(model.eval(), batch(source))[0].item()
    expected = 0.0
    for group in GROUPS:
        s, t = (
            sum((h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() for h in kept)
            / len(group)
            for kept in (
                [hidden[i] for i in group]
                for hidden in (states(model.speech_encoder, source), states(task.teachers[0].encoder, source))
            )
        )
        expected += (s - t).abs().mean().item() / 3
    assert loss == pytest.approx(expected, rel=1e-5)


def test_singletons_are_distillation_layer_by_layer(build: Any, small: Any) -> None:
    """With groups {0} and {last} the loss is DPHuBERT's on those layers; other layers do not matter."""
    source = small.waves()
    task, model, criterion = build(groups=[[0], [3]])
    loss = criterion(model.eval(), batch(source))[0].item()
    student, teacher = states(model.speech_encoder, source), states(task.teachers[0].encoder, source)
    parts = [
        F.l1_loss(student[i], teacher[i]) - F.cosine_similarity(student[i], teacher[i], dim=-1).mean() for i in (0, 3)
    ]
    assert loss == pytest.approx((sum(parts) / 2).item(), rel=1e-5)


def test_projections(build: Any, small: Any) -> None:
    """They start as the identity, serve only their groups, and can be shared."""
    source = batch(small.waves())
    start = build(projection="identity")[2]
    _, model, criterion = build(projection_sharing=[0, 1, 1])
    assert not list(start.parameters())
    assert sum(p.numel() for p in criterion.parameters()) == 2 * (32 * 32 + 32)
    before = means(start(model.eval(), source))
    assert means(criterion(model, source))["loss"] == pytest.approx(before["loss"], rel=1e-6)
    criterion.projections.projections[1].bias.data += 0.5
    after = means(criterion(model, source))
    assert after["l1_g0"] == before["l1_g0"]
    assert after["l1_g1"] != before["l1_g1"] and after["l1_g2"] != before["l1_g2"]
    assert sum(p.numel() for p in build(projection_sharing="none")[2].parameters()) == 3 * (32 * 32 + 32)
    assert sum(p.numel() for p in build()[2].parameters()) == 32 * 32 + 32


def test_size_term_takes_part_in_training_alone(build: Any, small: Any) -> None:
    task, model, criterion = build(UNITS, target_sparsity=0.6, sparsity_warmup=100)
    criterion.constraint.lambda1.data.fill_(0.4)
    criterion.constraint.lambda2.data.fill_(3.0)
    task.num_updates = 50
    source = batch(small.waves())
    model.eval()
    criterion.train()
    result = criterion(model, source)
    loss, log = result[0], means(result)
    encoder = model.speech_encoder
    sparsity = 1 - expected_parameters(encoder).item() / encoder.num_parameters()
    assert 0 < sparsity < 0.2
    assert float(log["expected_sparsity"]) == pytest.approx(sparsity, rel=1e-4)
    assert log["target_sparsity"] == pytest.approx(0.3)
    assert (log["lambda1"], log["lambda2"]) == (pytest.approx(0.4), pytest.approx(3.0))
    excess = sparsity - 0.3
    assert loss.item() - float(log["distillation_loss"]) == pytest.approx(0.4 * excess + 3 * excess**2, rel=1e-3)
    criterion.eval()
    result = criterion(model, source)
    log = means(result)
    assert result[0].item() == pytest.approx(log["distillation_loss"], rel=1e-6) and "expected_sparsity" in log


def test_the_target_may_be_of_macs(build: Any, small: Any) -> None:
    task, model, criterion = build(UNITS, target_sparsity=0.6, sparsity_warmup=0, cost="macs", cost_seconds=2.0)
    assert criterion.constraint.cost == MacCost(2.0)
    log = means(criterion(model.eval(), batch(small.waves())))
    expected = expected_sparsity(model.speech_encoder, cost=MacCost(2.0))
    assert float(log["expected_sparsity"]) == pytest.approx(expected, rel=1e-4)
    assert expected != pytest.approx(expected_sparsity(model.speech_encoder), rel=1e-2)


def test_multipliers_ascend_and_gates_follow(build: Any, small: Any) -> None:
    """For a student that is too dense, descent on the negated gradient makes lambda1 fall and gates close."""
    task, model, criterion = build(UNITS, target_sparsity=0.6, sparsity_warmup=0)
    criterion.constraint.lambda1.data.fill_(-1.0)
    model.train()
    criterion.train()
    criterion(model, batch(small.waves()))[0].backward()
    excess = 1 - expected_parameters(model.speech_encoder).item() / full_parameters(model.speech_encoder.config) - 0.6
    assert excess < -0.3
    assert criterion.constraint.lambda1.grad.item() == pytest.approx(-excess, rel=1e-3)
    assert criterion.constraint.lambda2.grad.item() == pytest.approx(-(excess**2), rel=1e-3)
    groups = {getattr(p, "param_group", "default") for p in [*model.parameters(), *criterion.parameters()]}
    assert groups == {"default", "gates", "multipliers"}
    model.zero_grad()
    expected = expected_parameters(model.speech_encoder)
    (criterion.constraint.lambda1 * (1 - expected / full_parameters(model.speech_encoder.config) - 0.6)).backward()
    for _, gate in model.speech_encoder.named_gates():  # a descent step lowers log_alpha
        assert (gate.grad > 0).all()


@pytest.mark.parametrize("rule", ["chunks", "convolution"])
def test_a_padded_batch_is_the_mean_over_the_frames_of_its_utterances(
    build: Any, small: Any, rule: str, tmp_path: Path
) -> None:
    """If no statistic runs over time (layer_norm extractors), padding changes nothing."""
    style = {**small.LARGE_STYLE, "padding_rule": rule}
    for name, seed in (("teacher", 0), ("student", 9)):
        save_encoder(small.random_encoder(seed, **style), tmp_path / f"{name}.safetensors")
    task, model, criterion = build(student=tmp_path / "student.safetensors", teacher=tmp_path / "teacher.safetensors")
    model.eval()
    criterion.eval()
    lengths = [8000, 5000, 3217]
    source, padding = torch.zeros(3, 8000), torch.ones(3, 8000, dtype=torch.bool)
    for row, length in enumerate(lengths):
        source[row, :length] = small.waves(length, 1, seed=row)[0]
        padding[row, :length] = False
    with torch.no_grad():
        result = loss, _, log = criterion(model, batch(source, padding))
        frames = (~model(source, padding)["padding_mask"]).sum(1)
        assert frames[0] == 24 and frames[2] < frames[1] < 24
        expected = 0.0
        for row, count in enumerate(frames.tolist()):
            # Last frames that only the rule "chunks" counts cover zeros of the padding, so append these.
            needed = max(lengths[row], 400 + 320 * (count - 1))
            alone = means(criterion(model, batch(source[row : row + 1, :needed])))["loss"]
            assert model(source[row : row + 1, :needed])["x"].size(1) == count
            expected += alone * count / frames.sum().item()
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert means(result)["loss"] == pytest.approx(expected, rel=1e-4)
    assert log["ntokens"] == sum(lengths) and log["frames"] == frames.sum()


def test_groups_from_a_file(build: Any, tmp_path: Path) -> None:
    flat, nested, as_json = tmp_path / "groups.yaml", tmp_path / "config.yaml", tmp_path / "clusters.json"
    flat.write_text("groups: [[0], [1, 2], [3]]\n")
    nested.write_text("criterion:\n  _name: skill_group_kd\n  groups: [[0], [1, 2], [3]]\n")
    as_json.write_text(json.dumps({"groups": GROUPS}))
    for path in (flat, nested, as_json):
        assert build(groups=None, groups_file=str(path))[2].projections.groups == ((0,), (1, 2), (3,))


def test_a_student_of_another_depth_maps_its_layers(build: Any, small: Any, tmp_path: Path) -> None:
    path = tmp_path / "deep.safetensors"
    save_encoder(small.random_encoder(encoder_layers=6), path)
    task, model, criterion = build(student=path)
    assert criterion.projections.student_groups == ((0,), (2, 4), (6,))
    source = small.waves()
    student, teacher = states(model.speech_encoder, source), states(task.teachers[0].encoder, source)
    l1 = F.l1_loss((student[2] + student[4]) / 2, (teacher[1] + teacher[2]) / 2).item()
    assert means(criterion(model.eval(), batch(source)))["l1_g1"] == pytest.approx(l1, rel=1e-5)


def test_another_width_needs_a_projection(build: Any, small: Any, tmp_path: Path) -> None:
    path = tmp_path / "narrow.safetensors"
    save_encoder(small.random_encoder(encoder_embed_dim=16), path)
    _, model, criterion = build(student=path)
    assert math.isfinite(criterion(model.eval(), batch(small.waves()))[0])
    with pytest.raises(ValueError, match=says("criterion.projection=identity", 16, 32, "criterion.projection=linear")):
        build(student=path, projection="identity")


def save_run(criterion: Any, path: Path) -> None:
    """The parts of a fairseq checkpoint from which projections are loaded."""
    cfg = {"criterion": OmegaConf.to_container(criterion.cfg, enum_to_str=True)}
    torch.save({"model": {}, "criterion": criterion.state_dict(), "cfg": cfg}, path)


def test_projections_of_stage_1_are_taken_over(build: Any, tmp_path: Path) -> None:
    _, _, stage1 = build(UNITS, target_sparsity=0.5)
    for parameter in stage1.projections.parameters():
        torch.nn.init.normal_(parameter)
    save_run(stage1, tmp_path / "stage1.pt")
    again = build(init_from=str(tmp_path / "stage1.pt"))[2]
    for name, tensor in again.projections.state_dict().items():
        assert torch.equal(tensor, stage1.projections.state_dict()[name])
    with pytest.raises(FileNotFoundError, match=says("criterion.init_from", "gone.pt")):
        build(init_from=str(tmp_path / "gone.pt"))


@pytest.mark.parametrize(
    ("field", "value", "before"),
    [
        ("groups", [[0], [1, 3], [2]], "[[0], [1, 2], [3]]"),
        ("projection_sharing", [0, 1, 1], "[0, 0, 0]"),
        ("normalize_states", True, "False"),
    ],
)
def test_projections_of_another_run_are_refused(
    build: Any, tmp_path: Path, field: str, value: Any, before: str
) -> None:
    """All but the second would match by shape."""
    save_run(build(UNITS, target_sparsity=0.5)[2], tmp_path / "stage1.pt")
    said = says("criterion.init_from", f"criterion.{field} = {before}", value, "criterion.init_from=null")
    with pytest.raises(ValueError, match=said):
        build(init_from=str(tmp_path / "stage1.pt"), **{field: value})


def test_a_file_without_projections_is_named(build: Any, teacher_file: Path, caplog: Any) -> None:
    """``model.init_from``, which ``criterion.init_from`` follows, can be one."""
    exported = build(init_from=str(teacher_file))[2]
    assert torch.equal(exported.projections.projections[0].weight, torch.eye(32))
    warning = next(record for record in caplog.records if record.levelname == "WARNING").getMessage()
    assert "criterion.init_from" in warning and str(teacher_file) in warning and "identity" in warning


def test_unequal_batches_have_the_gradients_of_one_large_batch(build: Any, small: Any, tmp_path: Path) -> None:
    """Like fairseq's: summed, and divided by the summed weights. Padding changes nothing in this extractor."""
    style = {**small.LARGE_STYLE, "padding_rule": "convolution"}
    for name, seed in (("teacher", 0), ("student", 9)):
        save_encoder(small.random_encoder(seed, **style), tmp_path / f"{name}.safetensors")
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("teacher", "student")}
    task, model, criterion = build(UNITS, **paths, target_sparsity=0.5, sparsity_warmup=0)
    criterion.constraint.lambda1.data.fill_(0.3)
    criterion.train()
    model.eval()  # gates at their expectation
    parameters = {**dict(model.named_parameters()), **dict(criterion.named_parameters())}
    parameters = {name: p for name, p in parameters.items() if p.requires_grad}
    waves = [small.waves(length, batch=rows, seed=length) for length, rows in ((8080, 1), (2960, 3), (4560, 1))]

    def gradients(batches: list[dict[str, Any]]) -> tuple[dict[str, Tensor], list[float]]:
        task.frames_of_weight_1 = None
        model.zero_grad()
        criterion.zero_grad()
        weights = []
        for each in batches:
            loss, weight, _ = criterion(model, each)
            loss.backward()
            weights.append(weight)
        return {name: p.grad / sum(weights) for name, p in parameters.items()}, weights

    found, weights = gradients([batch(wave) for wave in waves])
    assert weights == [1, 3 * 9 / 25, 14 / 25]
    large, padding = torch.zeros(5, 8080), torch.ones(5, 8080, dtype=torch.bool)
    for row, wave in enumerate(itertools.chain.from_iterable(waves)):
        large[row, : len(wave)], padding[row, : len(wave)] = wave, False
    expected, one = gradients([batch(large, padding)])
    assert one == [1]
    largest = max(grad.abs().max() for grad in expected.values())
    for name, grad in expected.items():
        assert (found[name] - grad).abs().max() < 2e-5 * largest, name
    excess = 1 - expected_parameters(model.speech_encoder).item() / full_parameters(model.speech_encoder.config) - 0.5
    assert found["constraint.lambda1"].item() == pytest.approx(-excess, rel=1e-5)  # once per update
    for part in ("log_alpha", "projections.0.weight", "fc1.weight"):
        assert all(grad.abs().max() > 0 for name, grad in expected.items() if name.endswith(part)), part


def test_validation_does_not_depend_on_the_batch_size(
    build: Any, small: Any, teacher_file: Path, tmp_path: Path
) -> None:
    """Also with an extractor whose statistics run over time, and utterances of very different lengths."""
    from fairseq import metrics

    lengths = [0.5, 0.1, 1.5, 0.5, 0.1, 0.1, 0.3]
    _, model, criterion = build(UNITS, target_sparsity=0.5)
    task = small.make_task(small.write_speech(tmp_path, {"valid": lengths}), teacher_file)
    task.load_dataset("valid")
    found = []
    for max_tokens in (8000, 30000, 200000):
        batches = list(task.get_batch_iterator(task.dataset("valid"), max_tokens=max_tokens).next_epoch_itr(False))
        with metrics.aggregate() as aggregator:
            for each in batches:
                criterion.reduce_metrics([task.valid_step(each, model, criterion.eval())[2]])
        found.append((len(batches), dict(aggregator.get_smoothed_values())))
    assert [number for number, _ in found] == [5, 4, 4]
    alone = [
        means(criterion(model, batch(task.dataset("valid")[i]["source"][None])))["loss"] for i in range(len(lengths))
    ]
    frames = [model.speech_encoder.config.num_frames(round(16000 * seconds)) for seconds in lengths]
    expected = sum(loss * count for loss, count in zip(alone, frames)) / sum(frames)
    for _, values in found:
        assert values["loss"] == pytest.approx(expected, abs=1e-4)
        for name in ("l1_g0", "cos_g2", "expected_sparsity"):
            assert values[name] == pytest.approx(found[0][1][name], abs=1e-4), name


def test_one_batch_an_update_has_the_weight_1_whatever_came_before(build: Any, small: Any) -> None:
    task, model, criterion = build()
    criterion.train()
    for samples in (4000, 8000):
        task.frames_of_weight_1 = None  # as the trainer does before an update
        assert criterion(model, batch(small.waves(samples)))[1] == 1
    assert criterion(model, batch(small.waves(4000)))[1] == 12 / 24
    criterion.eval()
    assert criterion(model, batch(small.waves(4000)))[1] == 1


def test_logs_are_means_over_frames_and_audio_is_counted_per_second(build: Any) -> None:
    from fairseq import metrics

    criterion = build()[2]
    logs = [
        {"loss": 60.0, "l1_g0": 30.0, "frames": 30, "audio_seconds": 3.0, "ntokens": 9, "nsentences": 1},
        {"loss": 40.0, "l1_g0": 0.0, "frames": 10, "audio_seconds": 5.0, "ntokens": 9, "nsentences": 1},
    ]
    with metrics.aggregate() as together:
        criterion.reduce_metrics(logs)
    with metrics.aggregate() as apart:  # validation: batch after batch
        for log in logs:
            criterion.reduce_metrics([log])
    for found in (together, apart):
        values = found.get_smoothed_values()
        assert (values["loss"], values["l1_g0"]) == (2.5, 0.75) and "audio_s_per_s" in values
        assert not {"frames", "audio_seconds", "ntokens"} & set(values)
    assert criterion.logging_outputs_can_be_summed()


@pytest.mark.parametrize(("groups", "layer"), [([[0], [1, 2]], 2), ([[0], [1]], 1), ([[0]], 0)])
@pytest.mark.parametrize("style", ["post", "pre"])
def test_layers_above_the_deepest_group_are_named_not_computed_and_not_trained(
    build: Any, small: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, groups: list, layer: int, style: str
) -> None:
    path = tmp_path / "teacher.safetensors"
    save_encoder(small.random_encoder(**(small.LARGE_STYLE if style == "pre" else {})), path)
    _, model, criterion = build(UNITS, path, path, groups=groups, target_sparsity=0.5, sparsity_warmup=0)
    above = "layer 3" if layer == 2 else f"layers {layer + 1} to 3"
    (message,) = [record.message for record in caplog.records if "criterion.groups" in record.message]
    assert re.search(says("criterion.groups", above, "size constraint"), message)
    ran: list[int] = []
    for i, block in enumerate(model.speech_encoder.transformer.layers, start=1):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    criterion.constraint.lambda1.data.fill_(-1.0)
    criterion.train()
    criterion(model.train(), batch(small.waves()))[0].backward()
    assert ran == list(range(1, layer + 1))
    for name, parameter in model.named_parameters():
        # Exactly the trainable weights have gradients; only the constraint moves the gates above.
        assert parameter.requires_grad == (parameter.grad is not None), name
        if name.endswith("log_alpha"):
            assert parameter.grad.abs().max() > 0, name
    frozen = [name.partition("transformer.layers.")[2] for name, p in model.named_parameters() if not p.requires_grad]
    assert {int(name[0]) + 1 for name in frozen if name} == set(range(layer + 1, 4))


def test_nothing_is_said_or_frozen_where_the_last_layer_is_supervised(
    build: Any, caplog: pytest.LogCaptureFixture
) -> None:
    _, model, _ = build(UNITS, target_sparsity=0.5)
    assert "criterion.groups" not in caplog.text
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["mask_emb"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"groups": [[0, 1], [1, 2]]}, ["criterion.groups", "layer 1", "twice"]),
        ({"groups": [[0], []]}, ["criterion.groups", "group []"]),
        ({"groups": []}, ["criterion.groups", "[]"]),
        ({"groups": [[0], [4]]}, ["criterion.groups", "layer 4", "0..3"]),
        ({"groups": [[-1]]}, ["criterion.groups", "layer -1"]),
        ({"groups": [["a"]]}, ["criterion.groups", "layer 'a'"]),
        ({"groups": 5}, ["criterion.groups", 5]),
        ({"groups": None}, ["criterion.groups: None", "criterion.groups_file: None"]),
        (
            {"groups_file": "some.yaml"},
            ["criterion.groups", "[[0], [1, 2], [3]]", "criterion.groups_file", "some.yaml"],
        ),
        ({"group_weights": [1.0]}, ["criterion.group_weights", "[1.0]", "3 numbers"]),
        ({"group_weights": [1.0, -1.0, 1.0]}, ["criterion.group_weights", "[1.0, -1.0, 1.0]", "3 numbers", ">= 0"]),
        ({"group_weights": [0.0, 0.0, 0.0]}, ["criterion.group_weights", "[0.0, 0.0, 0.0]", "not all 0"]),
        ({"group_weights": [1.0, float("nan"), 1.0]}, ["criterion.group_weights", "nan"]),
        ({"group_weights": 2}, ["criterion.group_weights", 2, "3 numbers"]),
        ({"group_weights": ["a", 1, 1]}, ["criterion.group_weights", "['a', 1, 1]", "3 numbers"]),
        ({"projection_sharing": [0, 2, 2]}, ["criterion.projection_sharing", "[0, 2, 2]", "gaps"]),
        ({"projection_sharing": [0, 0]}, ["criterion.projection_sharing", "[0, 0]", "3 groups"]),
        ({"target_sparsity": 0.5}, ["criterion.target_sparsity", 0.5, "gates"]),
        ({"target_sparsity": 1.0, "units": UNITS}, ["criterion.target_sparsity", 1.0]),
        ({"target_sparsity": -0.1, "units": UNITS}, ["criterion.target_sparsity", -0.1]),
        ({"target_sparsity": 0.99, "units": UNITS}, ["criterion.target_sparsity", 0.99, "cannot"]),
        ({"target_sparsity": 0.5, "units": ["heads"]}, ["criterion.target_sparsity", 0.5, "cannot", "['heads']"]),
        (
            {"target_sparsity": 0.5, "units": UNITS, "sparsity_warmup": -1},
            ["criterion.sparsity_warmup", -1.0, "updates"],
        ),
        ({"target_sparsity": 0.5, "units": UNITS, "cost": "flops"}, ["criterion.cost", "'flops'", "macs"]),
        ({"target_sparsity": None, "units": UNITS}, ["criterion.target_sparsity", "null", "model.pruning_units"]),
        ({"target_sparsity": float("nan"), "units": UNITS}, ["criterion.target_sparsity", "nan"]),
        ({"l1_weight": -1.0}, ["criterion.l1_weight", -1.0]),
        ({"cos_weight": float("inf")}, ["criterion.cos_weight", "inf"]),
        ({"l1_weight": float("nan")}, ["criterion.l1_weight", "nan"]),
        ({"l1_weight": 0.0, "cos_weight": 0.0}, ["criterion.l1_weight: 0", "criterion.cos_weight"]),
        ({"target_sparsity": 0.5, "units": UNITS, "sparsity_warmup": 1.5}, ["criterion.sparsity_warmup", 1.5]),
    ],
)
def test_what_is_refused(build: Any, fields: dict, said: list) -> None:
    units = fields.get("units")
    with pytest.raises(ValueError, match=says(*said)):
        build(units, **{name: value for name, value in fields.items() if name != "units"})


def test_group_files_that_are_refused(build: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=says("criterion.groups_file", "gone.yaml")):
        build(groups=None, groups_file=str(tmp_path / "gone.yaml"))
    empty = tmp_path / "empty.yaml"
    empty.write_text("layers: 3\n")
    with pytest.raises(ValueError, match=says("criterion.groups_file", "empty.yaml", "'groups'")):
        build(groups=None, groups_file=str(empty))
    broken = tmp_path / "broken.yaml"
    broken.write_text("groups: [[0], [1")
    with pytest.raises(ValueError, match=says("criterion.groups_file", "broken.yaml", "YAML")):
        build(groups=None, groups_file=str(broken))


@pytest.mark.parametrize("asked", [None, True, False])
@pytest.mark.parametrize("pre_norm", [True, False])
def test_states_are_normalised_where_the_teacher_needs_it(
    build: Any, small: Any, tmp_path: Path, pre_norm: bool, asked: Any
) -> None:
    """For pre-LayerNorm layers, unless the config says otherwise; the choice is filled into the config."""
    path = tmp_path / "teacher.safetensors"
    save_encoder(small.random_encoder(layer_norm_first=pre_norm), path)
    criterion = build(student=path, teacher=path, **({} if asked is None else {"normalize_states": asked}))[2]
    assert criterion.cfg.normalize_states is (pre_norm if asked is None else asked)


def test_the_target_rises_over_a_fraction_of_the_run(build: Any) -> None:
    for warmup, updates in ((0.25, 50), (7, 7)):
        criterion = build(UNITS, target_sparsity=0.5, sparsity_warmup=warmup, max_update=200)[2]
        assert criterion.constraint.warmup == updates


def test_groups_are_read_as_the_criterion_reads_them(tmp_path: Path) -> None:
    (tmp_path / "groups.yaml").write_text("groups: [[0], [1, 2]]\n")
    cfg = skill_group_kd.SkillGroupKDConfig(groups_file=str(tmp_path / "groups.yaml"))
    assert skill_group_kd.parse_groups(skill_group_kd.read_groups(cfg), 3) == ((0,), (1, 2))
    with pytest.raises(ValueError, match=says("criterion.groups", 2)):
        skill_group_kd.parse_groups(skill_group_kd.read_groups(cfg), 1)


def test_targets_of_several_costs(build: Any, small: Any) -> None:
    asked = {"parameters": 0.7, "macs": 0.6, "seconds": 2.0}
    task, model, criterion = build(UNITS, target=asked, sparsity_warmup=10, constraint="exact")
    task.num_updates = 5
    assert isinstance(criterion.constraint, ExactConstraint)
    criterion.constraint.impose(model.speech_encoder, 5)
    log = means(criterion(model.train(), batch(small.waves())))
    found = [float(log[f"expected_sparsity_{name}"]) for name in ("parameters", "macs")]
    assert [log[f"target_sparsity_{name}"] for name in ("parameters", "macs")] == pytest.approx([0.15, 0.2])
    assert min(found[0] - 0.15, found[1] - 0.2) == pytest.approx(0, abs=1e-5)
    assert found[1] == pytest.approx(expected_sparsity(model.speech_encoder, cost=MacCost(2.0)), abs=1e-5)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"target": {"macs": 0.5}, "target_sparsity": 0.5}, ["criterion.target_sparsity: 0.5", "conflicts", "=null"]),
        ({"target": {"macs": 0.5}, "cost": "macs"}, ["criterion.cost: macs", "=parameters"]),
        ({"target": {"macs": 0.001}}, ["criterion.target", "MACs", "cannot be reached", "gates on"]),
        ({"target": {"latency_ms": 5.0, "table": "nowhere.json"}}, ["criterion.target.table", "nowhere.json"]),
        ({"target": {"macs": 0.5}, "sparsity_warmup": 0.5, "max_update": 0}, ["criterion.sparsity_warmup"]),
    ],
)
def test_targets_that_are_refused(build: Any, fields: dict, said: list) -> None:
    with pytest.raises((ValueError, OSError), match=says(*said)):
        build(UNITS, **fields)
