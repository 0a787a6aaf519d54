"""Labels beside manifests, and objectives that learn from them: numbers, weights, falling losses, and refusals."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from messages import says
from omegaconf import OmegaConf
from oracle import RELATED, agrees, near, tensor, tensors
from torch import Tensor

from skill_fairseq.audio.manifest import read_manifest
from skill_fairseq.labels.targets import NONE, Target, pad_labels, read_targets, settings
from skill_fairseq.objectives.classification import aam_logits, cross_entropy
from skill_fairseq.objectives.ctc import ctc_loss, greedy_units
from skill_fairseq.objectives.objective import OBJECTIVES
from skill_fairseq.objectives.supervised import pool, weighted_sum

CASES = RELATED["cases"]["os_kdft"]


def test_speaker_losses_are_the_reference() -> None:
    case = CASES["speaker"]
    weight = tensor(case["weights"]["aam_weight"])
    labels, weights = torch.tensor(case["labels"]), torch.tensor(case["class_weights"]).double()
    usual = tensor(case["inputs"]["embedding"])
    opposite = 0.05 * usual - 1.5 * weight[labels]
    for name, embedding, beyond in (
        ("aam_paper_scripts", usual, True),
        ("aam_repository", usual, False),
        ("aam_paper_scripts_opposite", opposite, True),
        ("aam_repository_opposite", opposite, False),
    ):
        found, directions = embedding.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = cross_entropy(aam_logits(found, directions, labels, 0.2, 30.0, beyond), labels, weights)
        loss.backward()
        expected = case["results"][name]
        assert loss.item() == near(expected["loss"]), name
        for gradient, key in ((found.grad, "grad_norm_embedding"), (directions.grad, "grad_norm_weight")):
            assert gradient.norm().item() == near(expected.get(key, gradient.norm().item())), name
    softmax = tensors(case["weights"]["softmax"])
    logits = torch.nn.functional.linear(usual, softmax["fc.weight"], softmax["fc.bias"])
    assert cross_entropy(logits, labels, weights).item() == near(case["results"]["softmax_repository"]["loss"])


def test_pooling_is_the_reference_and_leaves_padding_out() -> None:
    case = CASES["pooling"]["inputs"]
    states, weights = tensor(case["states"]), tensor(case["layer_weights"])
    summed = weighted_sum(states.unbind(1), weights)
    assert agrees(pool(summed, deviation=True), CASES["pooling"]["pooled"])
    padded = torch.cat([summed, torch.full_like(summed, math.nan)], 1)
    mask = torch.arange(10).expand(4, 10) >= 5
    assert torch.equal(pool(padded, mask, True), pool(summed, deviation=True))
    assert pool(summed[:, :1], deviation=True)[:, 6:].max() < 1e-4  # of one frame


def test_who_has_no_label_does_not_count() -> None:
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    labels, weights = torch.tensor([0, NONE, 2, NONE, 1]), torch.tensor([1.0, 2.0, 3.0])
    there = labels >= 0
    wanted = torch.nn.functional.cross_entropy(logits[there], labels[there], weights.double())
    assert cross_entropy(logits, labels, weights).item() == pytest.approx(wanted.item())
    nobody = cross_entropy(logits, torch.full((5,), NONE))
    nobody.backward()
    assert nobody.item() == 0 and not logits.grad.any()


def by_hand(probs: Tensor, units: list[int]) -> float:
    """p(units), summed over every path."""
    total = 0.0
    for path in itertools.product(range(probs.size(1)), repeat=probs.size(0)):
        merged = [symbol for symbol, _ in itertools.groupby(path)]
        if [symbol - 1 for symbol in merged if symbol] == units:
            total += math.prod(probs[t, symbol].item() for t, symbol in enumerate(path))
    return total


def test_ctc_is_the_sum_over_paths() -> None:
    torch.manual_seed(0)
    log_probs = torch.randn(4, 5, 3, dtype=torch.float64).log_softmax(-1)
    labels = pad_labels([[0, 1], None, [1], [0, 0, 0, 0]], True)
    mask = torch.arange(5).expand(4, 5) >= torch.tensor([5, 5, 3, 5]).unsqueeze(1)
    probs = log_probs.exp()
    # The last one has too few frames for its units: it counts as 0, but its units count.
    wanted = -(math.log(by_hand(probs[0], [0, 1])) + math.log(by_hand(probs[2, :3], [1]))) / 7
    assert ctc_loss(log_probs, labels, mask).item() == pytest.approx(wanted)
    assert ctc_loss(log_probs, torch.full((4, 1), NONE), mask).item() == 0
    best = torch.tensor([[1, 1, 0, 1, 2], [0, 0, 0, 0, 0]])
    padding = torch.tensor([[False] * 4 + [True], [False] * 5])
    assert greedy_units(torch.nn.functional.one_hot(best, 3).double(), padding) == [[0, 0], []]


@pytest.fixture
def labelled(small: Any, tmp_path: Path) -> Path:
    """Eight training utterances: two speakers, tones as words of two letters; some without a label."""
    folder = small.write_speech(tmp_path / "speech", {"train": [0.6, 0.7, 0.8, 0.9] * 2, "valid": [0.6, 0.7, 2.0]})
    speakers, texts = (
        ["a", "b", "a", "", "b", "a", "b", "b"],
        ["x y |", "y |", "", "x x |", "y y |", "x |", "x y |", "y x |"],
    )
    for split, who, said in (("train", speakers, texts), ("valid", ["b", "c", ""], ["x |", "", "y |"])):
        rows = [f"{i}\t{name}\tword{i % 2}" for i, name in enumerate(who)]
        (folder / f"{split}.labels.tsv").write_text("\n".join(["utterance\tspeaker\tword", *rows, ""]))
        (folder / f"{split}.ltr").write_text("".join(f"{text}\n" for text in said))
    (folder / "dict.ltr.txt").write_text("| 8\ny 6\nx 6\n")
    return folder


TARGETS = {"speaker": {"column": "speaker"}, "letters": {"file": "ltr"}}


def test_labels_are_read_beside_the_manifest(labelled: Path, caplog: Any) -> None:
    targets = read_targets(TARGETS, labelled / "train.tsv")
    speaker, letters = targets["speaker"], targets["letters"]
    assert (speaker.classes, speaker.counts) == (("a", "b"), (3, 4))
    assert (letters.classes, letters.counts, letters.is_sequence) == (("|", "y", "x"), (), True)
    train, valid = (read_manifest(labelled / f"{split}.tsv") for split in ("train", "valid"))
    assert speaker.read(train) == [0, 1, 0, None, 1, 0, 1, 1]
    assert letters.read(train)[:3] == [[2, 1, 0], [1, 0], None]
    assert speaker.read(valid) == [1, None, None] and "'c'" in caplog.text
    # A run's saved settings hold the classes without a file.
    assert read_targets(settings(targets), Path("nowhere/train.tsv")) == targets


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([1], ["task.targets: [1]", "speaker"]),
        ({"s": {"colunm": "speaker"}}, ["task.targets.s", "colunm", "column"]),
        ({"s": {"column": 3}}, ["task.targets.s.column: 3"]),
        ({"s": {"classes": "ab"}}, ["task.targets.s.classes: 'ab'"]),
        ({"s": {"file": "ltr", "column": "x"}}, ["task.targets.s.column", "not a table"]),
        ({"s": {"column": "age"}}, ["train.labels.tsv", "age"]),
        ({"s": {"classes": ["a", "b"], "column": "speaker"}}, ["task.targets.s.counts"]),
        ({"s": {"file": "phn"}}, ["dict.phn.txt"]),
    ],
)
def test_targets_that_are_refused(labelled: Path, given: Any, said: list) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=says(*said)):
        read_targets(given, labelled / "train.tsv")


def test_labels_that_do_not_fit_are_refused(labelled: Path) -> None:
    targets, manifest = read_targets(TARGETS, labelled / "train.tsv"), read_manifest(labelled / "train.tsv")
    (labelled / "train.ltr").write_text("z |\n" * 8)
    with pytest.raises(ValueError, match=says("train.ltr, line 1", "'z'", "dict.ltr.txt")):
        targets["letters"].read(manifest)
    (labelled / "train.ltr").write_text("x |\n" * 7)
    with pytest.raises(ValueError, match=says("train.ltr", "7 lines", "8 recordings")):
        targets["letters"].read(manifest)
    (labelled / "train.labels.tsv").write_text("utterance\tspeaker\n" + "0\ta\n" * 8)
    with pytest.raises(ValueError, match=says("train.labels.tsv, line 3", "'0'", "'1'")):
        targets["speaker"].read(manifest)


def make(small: Any, folder: Path, student: Path, objectives: dict, **fields: Any) -> tuple:
    task = small.make_task(folder, None, enable_padding=True, targets=TARGETS, **fields)
    model = task.build_model(small.student_config(student))
    cfg = OmegaConf.create({"_name": "distillation", "objectives": objectives})
    return task, model, task.build_criterion(cfg), cfg


OBJECTIVE = {
    "softmax": {"_name": "classification", "target": "speaker", "class_weights": True},
    "margin": {"_name": "aam_softmax", "target": "speaker", "layers": "all", "pooling": "mean_std", "embedding_dim": 8},
    "letters": {"_name": "ctc", "target": "letters"},
}


def test_losses_fall_without_a_teacher(small: Any, labelled: Path, teacher_file: Path) -> None:
    """All three together; a checkpoint's config holds the classes."""
    torch.manual_seed(0)
    task, model, criterion, cfg = make(small, labelled, teacher_file, OBJECTIVE)
    assert task.teacher_sha256() is None
    assert OmegaConf.to_container(task.cfg.targets)["speaker"]["classes"] == ["a", "b"]
    for split in ("train", "valid"):
        task.load_dataset(split)
    parameters = [p for p in (*model.parameters(), *criterion.parameters()) if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    losses: dict[str, list[float]] = {}
    for _ in range(60):
        (sample,) = task.get_batch_iterator(task.dataset("train"), max_tokens=200000).next_epoch_itr()
        assert set(sample["targets"]["speaker"].tolist()) == {NONE, 0, 1}
        loss, _, log = criterion(model, sample)
        loss.backward()
        assert all(p.grad is not None for p in parameters)
        optimizer.step()
        optimizer.zero_grad()
        for name in OBJECTIVE:
            losses.setdefault(name, []).append(float(log[f"{name}_loss"]) / log["frames"])
    assert all(values[-1] < 0.8 * values[0] for values in losses.values()), losses
    model.eval(), criterion.eval()
    valid = task.get_batch_iterator(task.dataset("valid"), max_tokens=200000).next_epoch_itr()
    logs = [criterion(model, sample)[2] for sample in valid]
    total = {name: sum(float(log[name]) for log in logs) for name in logs[0]}
    assert total["softmax_accuracy/of"] == 1 and total["letters_unit_error_rate/of"] == 4  # units
    assert 0 <= total["letters_unit_error_rate"]


def test_units_of_what_is_not_heard_to_its_end_do_not_count(small: Any, labelled: Path, caplog: Any) -> None:
    task = small.make_task(labelled, None, enable_padding=True, targets=TARGETS, max_sample_size=12000)
    task.load_dataset("train")
    (labels,) = (values for target, values in task.dataset("train").targets.items() if target.name == "letters")
    assert [label is None for label in labels] == [False, False, True, True, False, False, True, True]
    assert "3 of 8 utterances are longer" in caplog.text
    task = small.make_task(labelled, None, targets=TARGETS)
    with pytest.raises(ValueError, match=says("task.targets.letters", "task.enable_padding=true")):
        task.load_dataset("train")


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"_name": "ctc", "target": "speaker"}, ["criterion.objectives.a.target", "speaker is a class"]),
        ({"_name": "classification", "target": "letters"}, ["criterion.objectives.a.target", "a sequence of units"]),
        ({"_name": "classification"}, ["criterion.objectives.a.target: None", "speaker, letters"]),
        ({**OBJECTIVE["softmax"], "layers": [9]}, ["criterion.objectives.a.layers: [9]", "0 to 3"]),
        ({**OBJECTIVE["softmax"], "layers": "first"}, ["criterion.objectives.a.layers: first"]),
        ({**OBJECTIVE["softmax"], "pooling": "max"}, ["criterion.objectives.a.pooling: 'max'", "mean_std"]),
        ({**OBJECTIVE["softmax"], "embedding_dim": -1}, ["criterion.objectives.a.embedding_dim: -1"]),
        ({**OBJECTIVE["margin"], "margin": 2.0}, ["criterion.objectives.a.margin: 2.0"]),
        ({**OBJECTIVE["margin"], "scale": 0.0}, ["criterion.objectives.a.scale: 0.0"]),
        ({"_name": "layers"}, ["task.teacher: not set"]),
    ],
)
def test_objectives_that_are_refused(small: Any, labelled: Path, teacher_file: Path, entry: dict, said: list) -> None:
    with pytest.raises(ValueError, match=says(*said)):
        make(small, labelled, teacher_file, {"a": entry})


def test_a_batch_without_a_label_moves_nothing(small: Any, labelled: Path, teacher_file: Path) -> None:
    _, model, criterion, _ = make(small, labelled, teacher_file, OBJECTIVE)
    units = torch.full((2, 1), NONE)
    sample = {"net_input": {"source": small.waves()}, "targets": {"speaker": units.flatten(), "letters": units}}
    loss, _, _ = criterion(model, sample)
    loss.backward()
    assert loss.item() == 0
    assert not any(p.grad.any() for p in criterion.parameters())


def test_a_head_of_other_classes_is_not_taken_over(
    small: Any, labelled: Path, teacher_file: Path, tmp_path: Path
) -> None:
    task, model, criterion, cfg = make(small, labelled, teacher_file, {"a": OBJECTIVE["softmax"]})
    plain = {"criterion": OmegaConf.to_container(cfg), "task": {"targets": settings(task.targets)}}
    torch.save({"criterion": criterion.state_dict(), "cfg": plain}, tmp_path / "before.pt")
    again = OmegaConf.create({**OmegaConf.to_container(cfg), "init_from": str(tmp_path / "before.pt")})
    assert torch.equal(
        task.build_criterion(again).state_dict()["objectives.a.classes.weight"],
        criterion.state_dict()["objectives.a.classes.weight"],
    )
    plain["task"]["targets"]["speaker"]["classes"] = ["b", "a"]
    torch.save({"criterion": criterion.state_dict(), "cfg": plain}, tmp_path / "before.pt")
    with pytest.raises(ValueError, match=says("criterion.init_from", "task.targets.speaker.classes", "['b', 'a']")):
        task.build_criterion(again)


def test_an_embedding_of_one_utterance_is_usable() -> None:
    targets = {"s": Target("s", "labels.tsv", "label", ("a", "b"), (1, 1))}
    kind, fields = OBJECTIVES["aam_softmax"]
    cfg = OmegaConf.merge(OmegaConf.structured(fields), {"target": "s", "embedding_dim": 4})
    from skill_fairseq.modules.config import EncoderConfig

    objective = kind(cfg, EncoderConfig(encoder_embed_dim=16, encoder_attention_heads=4), [], "a", targets)
    loss, _ = objective([torch.randn(1, 5, 16)], [], None, {"targets": {"s": torch.tensor([1])}})
    assert torch.isfinite(loss)
