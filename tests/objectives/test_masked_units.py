"""Masked units: codebooks against brute force, the loss against fairseq's HuBERT criterion, and refusals."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fairseq.criterions.hubert_criterion import HubertCriterion
from fairseq.models.hubert import HubertModel
from messages import says
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from skill_fairseq.audio.manifest import load_audio, read_manifest, write_manifest
from skill_fairseq.checkpoints import load_encoder
from skill_fairseq.cli.labels import main as skill_labels
from skill_fairseq.files import content_sha256, sha256
from skill_fairseq.labels.codebook import Codebook, assign, load_codebook
from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.taps import Tap
from skill_fairseq.objectives.masked_units import MaskedUnits, MaskedUnitsConfig
from skill_fairseq.objectives.teacher import FrozenTeacher
from skill_fairseq.tasks.skill_distillation import SkillDistillationTask
from tests.conftest import SHAPE

REPO = Path(__file__).resolve().parents[2]
TEACHER = REPO / "examples" / "tiny" / "teacher" / "teacher.safetensors"
FIELD = "criterion.objectives.units"
NO_MASKS = {"mask_prob": 0.0}


def book(books: int = 1, units: int = 5, width: int = 32, layer: int = 2, seed: int = 0) -> Codebook:
    generator = torch.Generator().manual_seed(seed)
    centroids = torch.randn(books, units, width, generator=generator)
    return Codebook(centroids, torch.rand(width, generator=generator) + 0.5, layer, "teacher.pt", "abc")


def make(folder: Path, *books: Codebook, student: Any = None, **fields: Any) -> MaskedUnits:
    """The objective between encoders of the tests' shape, float64 heads."""
    files = []
    for n, each in enumerate(books):
        each.save(folder / f"{n}.safetensors")
        files.append(str(folder / f"{n}.safetensors"))
    cfg = OmegaConf.merge(OmegaConf.structured(MaskedUnitsConfig), {"codebooks": files, **fields})
    torch.manual_seed(1)
    return MaskedUnits(cfg, EncoderConfig(**{**SHAPE, **(student or {})}), [EncoderConfig(**SHAPE)], FIELD).double()


def batch(seed: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States of student and teacher (2, 7, 32), padding and masked frames."""
    generator = torch.Generator().manual_seed(seed)
    own, theirs = (torch.randn(2, 7, 32, generator=generator, dtype=torch.float64) for _ in range(2))
    padding, masked = torch.zeros(2, 7, dtype=torch.bool), torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 5:] = masked[0, 1:4] = masked[1, 2:5] = True
    return own.requires_grad_(), theirs.float(), padding, masked


def test_units_are_the_nearest_centroids_of_what_is_left() -> None:
    """Against brute force, also for features with a mean far from 0, and for any input precision."""
    books, states = book(books=3), torch.randn(4, 6, 32)
    far = Codebook(books.centroids.clone(), books.scale, 2, "t", "abc")
    far.centroids[0] += 1000.0
    found = books.assign(states)
    assert found.shape == (4, 6, 3) and found.dtype == torch.int64
    assert torch.equal(far.assign(states + 1000.0), found)
    for x, units in zip(states.flatten(0, 1), found.flatten(0, 1)):
        rest = x
        for centroids, unit in zip(books.centroids, units):
            distances = ((rest - centroids) / books.scale).square().sum(-1)
            assert distances.argmin() == unit
            rest = rest - centroids[unit]
    assert torch.equal(books.assign(states.double()), found)
    assert torch.equal(books.assign(states.bfloat16()), books.assign(states.bfloat16().float()))


def test_a_file_holds_all_of_a_codebook(tmp_path: Path) -> None:
    books = book(books=2, layer=3)
    books.save(tmp_path / "c.safetensors")
    found = load_codebook(tmp_path / "c.safetensors", FIELD)
    assert torch.equal(found.centroids, books.centroids) and torch.equal(found.scale, books.scale)
    assert (found.layer, found.teacher, found.teacher_sha256) == (3, "teacher.pt", "abc")
    save_file({"centroids": books.centroids}, tmp_path / "other.safetensors")
    for name, said in (("other.safetensors", "is not a codebook"), ("none.safetensors", "does not exist")):
        with pytest.raises((ValueError, FileNotFoundError), match=says(FIELD, name, said, "skill-labels")):
            load_codebook(tmp_path / name, FIELD)


@pytest.mark.parametrize("head", ["cosine", "linear"])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.7, 0.3), (0.0, 1.0)])
def test_the_loss_is_a_weighted_mean_over_frames(head: str, weights: tuple[float, float], tmp_path: Path) -> None:
    """Per frame, with padding, for a file with two codebooks and another with one."""
    first, second = book(books=2), book(units=4, layer=1, seed=5)
    objective = make(
        tmp_path, first, second, head=head, head_dim=6, masked_weight=weights[0], unmasked_weight=weights[1]
    )
    own, theirs, padding, masked = batch()
    assert [tap.layers for tap in objective.teacher_taps] == [(2,), (1,)] and len(objective.heads) == 3
    assert objective.student_taps == [Tap((3,), masking=objective.masking)] and objective.masking is not None
    loss, log = objective([own], [theirs, theirs], padding, {"masked": {objective.masking: masked}})
    units = torch.cat([first.assign(theirs), second.assign(theirs)], -1)
    expected, right, seen = 0.0, 0, 0
    for b, t in (~padding).nonzero().tolist():
        weight = weights[0] if masked[b, t] else weights[1]
        for n, part in enumerate(objective.heads):
            if head == "linear":
                logits = own[b, t] @ part.weight.t() + part.bias
            else:
                projected = own[b, t] @ part.projection.weight.t() + part.projection.bias
                logits = torch.stack([F.cosine_similarity(projected, e, dim=0) for e in part.embeddings]) / 0.1
            expected -= weight * logits.log_softmax(0)[units[b, t, n]]
            right += int(weight > 0 and logits.argmax() == units[b, t, n])
            seen += weight > 0
    assert loss.item() == pytest.approx(expected.item() / 12, abs=1e-6)
    assert log["accuracy"].tolist() == [right, seen]
    (gradient,) = torch.autograd.grad(loss, own)
    reached = {0: masked & ~padding, 1: ~masked & ~padding}
    for index, frames in reached.items():
        assert bool(gradient[frames].abs().sum(-1).gt(0).all()) == (weights[index] > 0)
    assert not gradient[padding].any()


def test_the_loss_is_that_of_fairseqs_hubert_criterion(tmp_path: Path) -> None:
    """Its sums over masked and other frames, for its model's logits with the same head."""
    books = book()
    objective = make(tmp_path, books, head_dim=6, masked_weight=1.0, unmasked_weight=0.4)
    own, theirs, padding, masked = batch()
    (head,) = objective.heads
    units = books.assign(theirs)[..., 0]

    def logits(frames: Tensor) -> list[Tensor]:
        target = head.embeddings[units[frames]]
        negatives = head.embeddings.unsqueeze(1).expand(-1, len(target), -1)
        like = SimpleNamespace(logit_temp=0.1)
        return [HubertModel.compute_nce(like, head.projection(own[frames]), target, negatives).double()]

    class Net:
        get_logits, get_targets = HubertModel.get_logits, HubertModel.get_targets

        def __call__(self, **inputs: Any) -> Any:
            return {"logit_m_list": logits(masked & ~padding), "logit_u_list": logits(~masked & ~padding)}

    criterion = HubertCriterion(None, 1.0, 0.4)
    total, frames, _ = criterion(Net(), {"target_list": [units], "net_input": {}, "id": torch.arange(2)})
    loss, _ = objective([own], [theirs], padding, {"masked": {objective.masking: masked}})
    assert frames == 12 and loss.item() == pytest.approx(total.item() / frames, abs=1e-5)


def test_where_nothing_is_masked_every_frame_counts(tmp_path: Path) -> None:
    """In validation, and without masking; if all frames of a batch have weight 0, the loss is 0."""
    own, theirs, padding, masked = batch()
    objective = make(tmp_path, book(), masked_weight=0.5)
    without = make(tmp_path, book(), masked_weight=0.5, **NO_MASKS)
    valid, _ = objective([own], [theirs], padding)
    assert without.student_taps[0].masking is None
    assert valid.item() == without([own], [theirs], padding, {})[0].item() > 0
    sample = {"masked": {objective.masking: torch.zeros_like(masked)}}
    nothing, _ = objective([own], [theirs], padding, sample)
    nothing.backward()
    assert nothing.item() == 0 and all(p.grad is not None and not p.grad.any() for p in objective.parameters())


def test_pre_norm_students_predict_from_normalised_states(tmp_path: Path) -> None:
    assert make(tmp_path, book(), student={"layer_norm_first": True}).student_taps[0].normalize
    assert make(tmp_path, book(), student_layer=1).student_taps[0].layers == (1,)


def test_units_of_a_batch_are_those_of_the_label_files(tmp_path: Path) -> None:
    """On real speech and the small teacher; labels of two codebooks, and hashes of file and teacher."""
    data = REPO / "examples" / "tiny" / "data"
    manifest = read_manifest(data / "valid.tsv")
    short = sorted(range(len(manifest)), key=lambda i: manifest.sizes[i])[:12]
    write_manifest(
        tmp_path / "some.tsv",
        manifest.root.resolve(),
        [manifest.paths[i] for i in short],
        [manifest.sizes[i] for i in short],
    )
    out = tmp_path / "out"
    command = [str(tmp_path / "some.tsv"), "--units", "kmeans", "--teacher", str(TEACHER), "--layer", "7"]
    assert skill_labels([*command, "--vocabulary-size", "20", "--codebooks", "2", "--out", str(out)]) == 0
    found = load_codebook(out / "codebook.safetensors", FIELD)
    assert found.centroids.shape == (2, 20, 80) and found.layer == 7
    assert found.teacher_sha256 == content_sha256(TEACHER)
    assert (out / "dict.km0.txt").read_text().split("\n")[:2] == ["0 1", "1 1"]
    teacher, lines = (
        FrozenTeacher(load_encoder(TEACHER)),
        [(out / f"some.km{n}").read_text().splitlines() for n in (0, 1)],
    )
    for row, i in enumerate(short):
        (states,) = teacher.tap(load_audio(manifest.files[i])[None], None, [Tap((7,))])
        units = found.assign(states)[0].t().tolist()
        assert [" ".join(map(str, each)) for each in units] == [lines[n][row] for n in (0, 1)]
    used = {unit for line in lines[0] for unit in line.split()}
    assert len(used) == 20  # no centroid is idle
    frames = torch.cat([teacher.tap(load_audio(manifest.files[i])[None], None, [Tap((7,))])[0][0] for i in short])
    left = [frames / found.scale]
    for n in (0, 1):
        units = assign(frames, found.centroids[: n + 1], found.scale)
        left.append((frames - sum(found.centroids[k][units[:, k]] for k in range(n + 1))) / found.scale)
    spread = [rest.var(0, unbiased=False).mean().item() for rest in left]
    assert spread[0] == pytest.approx(1.0, abs=1e-3) and spread[2] < 0.8 * spread[1] < 0.5 * spread[0]


def test_mfcc_units_have_labels_and_no_codebook(tmp_path: Path) -> None:
    data = REPO / "examples" / "tiny" / "data"
    manifest = read_manifest(data / "valid.tsv")
    write_manifest(tmp_path / "a.tsv", manifest.root.resolve(), manifest.paths[:4], manifest.sizes[:4])
    command = [str(tmp_path / "a.tsv"), "--units", "kmeans", "--vocabulary-size", "8", "--out", str(tmp_path / "out")]
    assert skill_labels(command) == 0
    rows = (tmp_path / "out" / "a.km").read_text().splitlines()
    assert [len(row.split()) for row in rows] == [1 + (size - 400) // 160 for size in manifest.sizes[:4]]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.km", "dict.km.txt"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--units", "kmeans", "--transcripts", "x"], ["--transcripts", "does nothing", "kmeans"]),
        (["--transcripts", "x", "--teacher", "t", "--layer", "1"], ["--teacher", "does nothing", "--units kmeans"]),
        ([], ["required", "--transcripts"]),
        (["--units", "kmeans", "--teacher", "t"], ["--layer", "--teacher"]),
        (["--units", "kmeans", "--codebook-only"], ["--codebook-only", "--teacher"]),
        (["--units", "kmeans", "--teacher", str(TEACHER), "--layer", "13"], ["--layer: 13", "12 layers"]),
        (["--units", "kmeans", "--vocabulary-size", "999999"], ["--vocabulary-size: 999999", "frames"]),
    ],
)
def test_what_skill_labels_refuses(options: list, said: list, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    manifest = read_manifest(REPO / "examples" / "tiny" / "data" / "valid.tsv")
    write_manifest(tmp_path / "a.tsv", manifest.root.resolve(), manifest.paths[:2], manifest.sizes[:2])
    assert skill_labels([str(tmp_path / "a.tsv"), "--out", str(tmp_path / "out"), *options]) != 0
    error = capsys.readouterr().err
    assert all(part in error for part in said), error
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"codebooks": None}, ["codebooks", "not set", "skill-labels"]),
        ({"codebooks_sha256": ["0"]}, ["codebooks_sha256", "0"]),
        ({"teacher": 1}, ["teacher", 1, "below 1"]),
        ({"student_layer": 9}, ["student_layer", 9, "0 to 3"]),
        ({"head": "mlp"}, ["head", "mlp", "cosine, linear"]),
        ({"temperature": 0.0}, ["temperature", 0.0, "above 0"]),
        ({"masked_weight": -1.0}, ["masked_weight", -1.0]),
        ({"unmasked_weight": 0.5, **NO_MASKS}, ["unmasked_weight", 0.5, "mask_prob=0"]),
    ],
)
def test_what_is_refused(fields: dict, said: list, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says(f"{FIELD}.{said[0]}", *said[1:])):
        make(tmp_path, book(), **fields)


@pytest.fixture
def trained(small: Any, speech: Path, teacher_file: Path, tmp_path: Path) -> Any:
    """Task, model and criterion: units beside group means, of a student with gates."""
    encoder = load_encoder(teacher_file)
    with torch.no_grad():
        states = encoder(small.waves(16000, 4)).hidden_states[2].flatten(0, 1)
    centroids = states[:: len(states) // 8][:8].repeat(1, 1, 1)
    books = Codebook(centroids, states.std(0), 2, "t", content_sha256(teacher_file))
    books.save(tmp_path / "c.safetensors")
    objectives = {
        "units": {
            "_name": "masked_units",
            "codebooks": [str(tmp_path / "c.safetensors")],
            "mask_length": 3,
            "head_dim": 8,
        },
        "means": {"_name": "group_means", "groups": [[0], [1, 2, 3]]},
    }
    task = small.make_task(speech, teacher_file, max_sample_size=8000)
    torch.manual_seed(3)
    model = task.build_model(small.student_config(teacher_file, pruning_units=["heads", "ffn"]))
    fields = {"objectives": objectives, "target_sparsity": 0.2, "sparsity_warmup": 10}
    return task, model, task.build_criterion(OmegaConf.create({"_name": "distillation", **fields}))


def test_the_loss_falls_beside_group_means_and_gates(trained: Any) -> None:
    """The accuracy on masked frames also rises, and the student's mask embedding is learned."""
    task, model, criterion = trained
    task.load_dataset("train")
    iterator = task.get_batch_iterator(task.dataset("train"), max_tokens=100000, seed=1, epoch=1)
    sample = next(iter(iterator.next_epoch_itr(shuffle=False)))
    assert sample["masked"].keys() == set(task.maskings) and len(task.maskings) == 1
    model.train(), criterion.train()
    before = model.mask_emb.clone()
    student = [
        p for name, p in [*model.named_parameters(), *criterion.objectives.named_parameters()] if p.requires_grad
    ]
    optimizer, logs = torch.optim.Adam(student, 0.01), []
    for _ in range(25):
        optimizer.zero_grad()
        torch.manual_seed(0)
        loss, _, log = criterion(model, sample)
        loss.backward()
        optimizer.step()
        logs.append(log)
    losses = [float(log["units_loss"]) / log["frames"] for log in logs]
    share = next(iter(sample["masked"].values())).float().mean().item()
    assert losses[0] > 0.8 * share * torch.tensor(8.0).log() and losses[-1] < 0.7 * losses[0]
    right = [float(log["units_accuracy"]) for log in logs]
    assert right[-1] > 1.3 * right[0]
    assert not torch.equal(model.mask_emb, before)
    saved = criterion.chosen()["objectives"]["units"]
    assert len(saved["codebooks_sha256"]) == 1 and saved["student_layer"] == 3
    assert not any("centroids" in name for name in criterion.state_dict())


def test_codebooks_of_another_teacher_are_refused(tmp_path: Path) -> None:
    """Immediately by width or depth, in the task by the file's hash."""
    for other, said in ((book(width=16), "width 16"), (book(layer=9), "layer 9")):
        with pytest.raises(ValueError, match=says(f"{FIELD}.codebooks", "0.safetensors", said, "3 layers of width 32")):
            make(tmp_path, other)
    objective = make(tmp_path, book())
    assert objective.cfg.codebooks_sha256 == [sha256(tmp_path / "0.safetensors")]
    again = make(tmp_path, book(), codebooks_sha256=objective.cfg.codebooks_sha256)
    assert again.settings(dict(again.cfg)) == objective.settings(dict(objective.cfg))
    task = SimpleNamespace(cfg=SimpleNamespace(teacher=str(TEACHER)))
    with pytest.raises(ValueError, match=says(FIELD, "0.safetensors", "teacher.pt", "abc", content_sha256(TEACHER))):
        SkillDistillationTask.check_made_with(task, 0, objective.made_with[0], FIELD)
    made = [("a", "b", content_sha256(TEACHER))]
    assert SkillDistillationTask.check_made_with(task, 0, made, FIELD) is None
