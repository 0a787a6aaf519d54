"""The page on a run shows the files' numbers."""

from __future__ import annotations

import base64
import json
import re
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from messages import says

from skill_fairseq.audio.manifest import read_manifest
from skill_fairseq.checkpoints import load_encoder, save_encoder
from skill_fairseq.comparison.layer_distance import layer_distances
from skill_fairseq.reporting.run_folder import read_run_folder
from skill_fairseq.reporting.run_report import repeat_section, run_report
from skill_fairseq.reporting.training_section import thinned, training_section


def report(path: Path, out: Path, **options: Path) -> str:
    out.mkdir(exist_ok=True)
    return run_report(read_run_folder(path, **options), out, 120.0)


@pytest.fixture(scope="module")
def made(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp("made")
    return report(run_folder, out), out


def section(html: str, head: str) -> str:
    found = re.search(rf"<section[^>]*><h2>{re.escape(head)}</h2>(.*?)</section>", html, re.DOTALL)
    assert found, f"no section {head}"
    return found[1]


def rows(html: str) -> list[list[str]]:
    """Cells of every table row."""
    lines = re.findall(r"<tr>(.*?)</tr>", html)
    return [[unescape(cell) for cell in re.findall(r"<t[dh]>(.*?)</t[dh]>", line)] for line in lines]


def test_sizes_stand_beside_the_teachers(made: tuple, run_folder: Path, teacher_file: Path) -> None:
    table = {row[0]: row for row in rows(section(made[0], "Size and speed"))}
    teacher = load_encoder(teacher_file)
    for name in ("shrunk", "student"):
        encoder = load_encoder(run_folder / f"{name}.safetensors")
        assert table[name][1] == f"{encoder.num_parameters():,}"
        assert table[name][2] == f"{100 * encoder.num_parameters() / teacher.num_parameters():.2f} %"
        assert table[name][3] == f"{encoder.macs(10) / 1e9:.3f}"
        assert float(table[name][5]) > 0 and float(table[name][6]) > 0
    assert table["teacher"][1:3] == [f"{teacher.num_parameters():,}", "100.00 %"] and table["teacher"][6] == "1.00"
    assert f"of the teacher&#x27;s {teacher.num_parameters():,} parameters (50." in made[0]


def test_curves_have_the_logs_numbers(made: tuple) -> None:
    html = section(made[0], "Training")
    assert ["update", "distillation loss", "expected sparsity", "target", "gradient norm"] in rows(html)
    assert ["20", "-0.6234", "0.3456", "0.4000", "1.500"] in rows(html)
    assert ["20", "-0.8888", "1.500"] in rows(html)  # stage 2, logged as JSON, has no sparsity
    assert re.search(r"30 updates\..* -0\.5123 .*, -0\.7345 .* -0\.6543\b", html)
    assert re.search(r"sparsity 0\.4987, .* 0\.5000\b", html)
    alts = re.findall(r'alt="([^"]*)"', html)
    assert sum(bool(re.search(says("sparsity", "stage1"), alt)) for alt in alts) == 1
    assert sum(bool(re.search(says("loss", "stage2"), alt)) for alt in alts) == 1 and len(alts) == 5


def test_curves_are_drawn_through_the_logs_points(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    drawn, plot = [], Axes.plot

    def spy(axes: Axes, *data: Any, **options: Any) -> Any:
        drawn.append((options.get("label"), *data[:2]))
        return plot(axes, *data, **options)

    monkeypatch.setattr(Axes, "plot", spy)
    report(run_folder, tmp_path)
    wanted = ("training", "validation", "expected", "target")
    lines = [(label, list(x), list(y)) for label, x, y in drawn if label in wanted]
    assert ("expected", [10, 20, 30], [0.0123, 0.3456, 0.4987]) in lines
    assert ("target", [10, 20, 30], [0.2, 0.4, 0.5]) in lines
    assert ("training", [10, 20, 30], [-0.5123, -0.6234, -0.7345]) in lines
    assert ("validation", [20], [-0.6543]) in lines and ("training", [10, 20], [-0.7777, -0.8888]) in lines


def test_probes_have_their_intervals(made: tuple) -> None:
    table = rows(section(made[0], "What frozen features know"))
    assert ["student", "12,105", "83.7 [79.1, 87.4], 251 of 300"] in table
    assert ["logmel", "-", "49.3 [43.7, 55.0], 148 of 300"] in table


def test_distances_are_those_of_the_states(made: tuple, run_folder: Path, teacher_file: Path, speech: Path) -> None:
    files = read_manifest(speech / "valid.tsv").files
    found = layer_distances(load_encoder(run_folder / "student.safetensors"), load_encoder(teacher_file), files).layers
    table = rows(section(made[0], "Distance to the teacher"))
    groups = json.loads((run_folder / "clusters" / "clusters.json").read_text())["groups"]
    for layer in range(4):
        row = next(row for row in table if row[0] == str(layer))
        assert row[6:] == [f"{found[kind][layer]:.4f}" for kind in ("l1", "l1_normalized", "cos", "cka")]
        assert layer in groups[int(row[1])]


def test_what_is_left_of_each_layer(made: tuple, run_folder: Path) -> None:
    config = load_encoder(run_folder / "student.safetensors").config
    table = rows(section(made[0], "What is left: student"))
    for i, kept in enumerate(config.conv_channels):
        assert [str(i), f"{kept} / 16"] in table
    for i, (heads, units) in enumerate(zip(config.heads, config.ffn_dims), start=1):
        which = " ".join(map(str, heads)) if heads else "-"
        assert [str(i), f"{len(heads)} / 4" if heads else "bias only", which, f"{units} / 48"] in table


def test_groups_and_their_picture(made: tuple, run_folder: Path) -> None:
    html = section(made[0], "Layer similarity and groups")
    for number, group in enumerate(json.loads((run_folder / "clusters" / "clusters.json").read_text())["groups"]):
        row = next(row for row in rows(html) if row[0] == str(number))
        assert row[1] == ", ".join(map(str, group))
    assert html.count("<img") == 1 and "dendrogram" in html


def test_settings_and_commands_to_repeat(made: tuple, run_folder: Path, teacher_file: Path, speech: Path) -> None:
    settings, repeat = section(made[0], "Settings and versions"), section(made[0], "How to repeat it")
    repeat = unescape(re.sub("</?span>", "", repeat))
    assert "seed: 4711" in settings and "by: student" in settings
    assert rows(settings)[0][:3] == ["made with", "skill_fairseq", "python"]
    assert "skill-cluster --teacher teacher.safetensors --manifest train.tsv --measure cka_minibatch" in repeat
    assert "--num-groups 2 --max-seconds 600 --seed 0" in repeat
    assert (
        "fairseq-hydra-train --config-dir config/distill --config-name tiny common.seed=4711 "
        "'criterion.groups=[[0],[1,2]]' hydra.run.dir=stage1" in repeat
    )
    probing = f"skill-probe teacher={teacher_file} student=student.safetensors logmel --task TASKS/digit"
    assert f"{probing} --json > probe.json" in repeat
    assert "skill-shrink stage1/checkpoint_last.pt shrunk.safetensors --sparsity 0.4<" in repeat
    assert f"skill-report {run_folder} --teacher {teacher_file} --data {speech}<" in repeat
    assert "(TASKS)" in repeat


@pytest.mark.parametrize(
    ("saved", "there", "shown"),
    [
        ("checkpoints", None, "stage1/checkpoints/checkpoint_last.pt"),  # the README's and submit.sh's layout
        ("{run}/stage1", None, "stage1/checkpoint_last.pt"),  # the layout of examples/tiny/run.sh
        ("/elsewhere/my runs", None, "'/elsewhere/my runs/checkpoint_last.pt'"),
        ("/before/it/was/moved", "stage1/checkpoint_last.pt", "stage1/checkpoint_last.pt"),
        ("/before/it/was/moved", "stage1/checkpoints/checkpoint_last.pt", "stage1/checkpoints/checkpoint_last.pt"),
    ],
)
def test_commands_name_the_checkpoint_where_it_lies(
    saved: str, there: str | None, shown: str, run_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    shutil.copytree(run_folder / "stage1", path / "stage1")
    for name in ("shrunk.safetensors", "student.safetensors"):
        shutil.copy(run_folder / name, path)
    save_dir = saved.format(run=path)
    (path / "stage1" / ".hydra" / "config.yaml").write_text(f"checkpoint: {{save_dir: {save_dir}}}\n")
    if there:
        (path / there).parent.mkdir(exist_ok=True)
        (path / there).touch()
    repeat = unescape(re.sub("</?span>", "", repeat_section(read_run_folder(path), {})))
    assert f"skill-shrink {shown} shrunk.safetensors" in repeat
    assert f"skill-export {shown} student.safetensors" in repeat


def test_relative_paths_of_the_settings_start_where_the_command_was_given(
    run_folder: Path, tmp_path: Path, teacher_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    shutil.copytree(run_folder / "stage1", path / "stage1")
    hydra = f"hydra: {{job: {{config_name: tiny}}, runtime: {{cwd: {teacher_file.parent}}}}}\n"
    (path / "stage1" / ".hydra" / "hydra.yaml").write_text(hydra)
    (path / "stage1" / ".hydra" / "config.yaml").write_text(f"task: {{teacher: {teacher_file.name}}}\n")
    monkeypatch.chdir(tmp_path)
    assert read_run_folder(path).models == {"teacher": teacher_file}


def test_losses_that_are_not_finite_are_said_and_not_drawn(run_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(run_folder / "stage1", path / "stage1")
    log = path / "stage1" / "hydra_train.log"
    log.write_text(log.read_text().replace("loss=-0.5123", "loss=nan").replace("loss=-0.7345", "loss=inf"))
    html = training_section(read_run_folder(path).stages, tmp_path)
    assert re.search(r"loss nan .*, inf .* 2 of 3 .*not finite.* update 10\b", html)
    assert ["10", "nan", "0.0123", "0.2000", "1.500"] in rows(html) and html.count("<img") == 3
    log.write_text(log.read_text().replace("distillation_loss=nan, ", "").replace("expected_sparsity=0.4987, ", ""))
    html = training_section(read_run_folder(path).stages, tmp_path)
    assert re.search(r"loss -0\.6234 .*, inf ", html) and "Expected sparsity 0" not in html


def test_logs_of_submit_are_no_trainings(run_folder: Path, tmp_path: Path) -> None:
    """logs/stage1.log, a job's screen output, repeats stage1/hydra_train.log; so does a copy beside it."""
    path = tmp_path / "run"
    shutil.copytree(run_folder / "stage1", path / "stage1")
    for copy in ("logs/stage1.log", "old.log"):
        (path / copy).parent.mkdir(exist_ok=True)
        shutil.copy(path / "stage1" / "hydra_train.log", path / copy)
    assert [stage.name for stage in read_run_folder(path).stages] == ["stage1"]


def test_the_page_is_self_contained_and_its_pictures_are_the_files(made: tuple) -> None:
    html, out = made
    assert not re.search(r"(?:src|href)=[\"'](?!data:image/png;base64,|#)", html)
    assert "<script" not in html and "url(" not in html and "@import" not in html
    inside = {base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([^\"]+)", html)}
    files = {file.read_bytes() for file in out.glob("*.png")}
    assert inside == files and len(files) == 11 and all(data.startswith(b"\x89PNG") for data in files)
    assert "Left out" not in html


def test_what_is_missing_is_left_out_and_named(run_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "part"
    path.mkdir()
    shutil.copytree(run_folder / "stage2", path / "stage2")
    shutil.copy(run_folder / "student.safetensors", path)
    html = report(path, tmp_path / "out")
    left_out = section(html, "Left out")
    for what in ("clusters/clusters.json", "shrunk.safetensors", "the teacher", "valid.tsv", "probe.json"):
        assert f"<li>{what}: " in left_out or f"<li>{what} of " in left_out, what
    assert "student.safetensors:" not in left_out and "Distance to the teacher" not in html
    heads = re.findall(r"<h2>(.*?)</h2>", html)
    own = ["Size and speed", "Training", "What is left: student"]
    assert heads == [*own, "Settings and versions", "How to repeat it", "Left out"]


def test_teacher_and_data_may_be_given(run_folder: Path, tmp_path: Path, teacher_file: Path, speech: Path) -> None:
    path = tmp_path / "part"
    path.mkdir()
    shutil.copy(run_folder / "student.safetensors", path)
    html = report(path, tmp_path / "out", teacher=teacher_file, data=speech)
    assert "6 recordings of valid.tsv" in section(html, "Distance to the teacher")


def test_a_teacher_of_another_depth_is_no_obstacle(run_folder: Path, tmp_path: Path, small: Any) -> None:
    save_encoder(small.random_encoder(encoder_layers=2), tmp_path / "other.safetensors")
    html = report(run_folder, tmp_path / "out", teacher=tmp_path / "other.safetensors")
    table = rows(section(html, "Distance to the teacher"))
    assert table[0][:3] == ["layer", "group", "shrunk: L1"] and [row[0] for row in table[1:]] == ["0", "1", "2"]
    assert len(table[2][2].split(", ")) == 2  # layers 1 and 2 of the student's 3 are nearest to the first of 2


def test_text_from_files_is_escaped(run_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "<b>run"
    path.mkdir()
    shutil.copytree(run_folder / "stage2", path / "<i>stage")
    html = report(path, tmp_path / "out")
    assert "<b>" not in html and "<i>" not in html and "&lt;i&gt;stage" in html


def test_long_tables_are_thinned_to_first_and_last() -> None:
    assert thinned(3, 50) == [0, 1, 2]
    chosen = thinned(1001, 50)
    assert len(chosen) == 50 and (chosen[0], chosen[-1]) == (0, 1000)
    assert max(b - a for a, b in zip(chosen, chosen[1:])) <= 21


def test_empty_damaged_and_absent_folders(tmp_path: Path, run_folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=says(tmp_path / "none", "folder of a run")):
        read_run_folder(tmp_path / "none")
    with pytest.raises(ValueError, match=says(tmp_path, "clusters/")):
        read_run_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match=says("--teacher", tmp_path / "none.pt")):
        read_run_folder(run_folder, teacher=tmp_path / "none.pt")
    (tmp_path / "probe.json").write_text("{")
    with pytest.raises(ValueError, match=says("probe.json", "JSON", "make it again")):
        read_run_folder(tmp_path)
