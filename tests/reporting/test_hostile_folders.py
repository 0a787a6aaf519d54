"""Untrusted and damaged folders: nothing is written outside, and no file causes a traceback."""

from __future__ import annotations

import copy
import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from damaged import bounds, spoiled
from messages import says

from skill_fairseq.cli.report import main
from skill_fairseq.reporting import pictures
from skill_fairseq.reporting.benchmark_report import benchmark_report
from skill_fairseq.reporting.run_folder import read_run_folder
from skill_fairseq.reporting.run_report import run_report

NAMES = ["x/../../../OUTSIDE", "/OUTSIDE", "..", "a\0b", "a" * 400, "$^{2$x", "два слова", "a-b", "a b", "", "\x1b[1m"]
ODD = [None, True, -1, 0, 10**40, float("nan"), float("inf"), 1e308, "", "x", "\ud800", [], [[]], {}, {"a": []}]


def probes(*names: str) -> str:
    entry = {"model": "m", "parameters": 1, "metric": "accuracy", "value": 0.5, "interval": [0.4, 0.6]}
    return json.dumps({"results": [{**entry, "model": name, "task": name} for name in names]})


def test_no_name_in_a_file_leads_out_of_the_folder(tmp_path: Path) -> None:
    run = tmp_path / "a" / "b" / "run"
    run.mkdir(parents=True)
    (run / "probe.json").write_text(probes(*NAMES))
    assert main([str(run)]) == 0
    made = {file.relative_to(tmp_path) for file in tmp_path.rglob("*") if file.is_file()}
    assert {file.parent for file in made} == {Path("a/b/run"), Path("a/b/run/report")}
    assert len(made) == 1 + len(NAMES) + 1  # probe.json, one picture per task, the page
    assert (run / "report" / "probe_a-b.png").is_file()  # a harmless name does not change


def test_links_in_the_folder_are_not_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, mine = tmp_path / "run", tmp_path / "mine"
    (run / "report").mkdir(parents=True)
    mine.mkdir()
    (mine / "notes").write_text("mine")
    (run / "probe.json").write_text(probes("digit"))
    for name in ("report.html", "probe_digit.png"):
        (run / "report" / name).symlink_to(mine / "notes")
    assert main([str(run)]) == 0
    assert (mine / "notes").read_text() == "mine" and "<html" in (run / "report" / "report.html").read_text()
    shutil.rmtree(run / "report")
    (run / "report").symlink_to(mine)
    capsys.readouterr()
    assert main([str(run)]) == 2
    said = capsys.readouterr().err
    assert re.search(says(run / "report", "link", "--out"), said) and [file.name for file in mine.iterdir()] == [
        "notes"
    ]


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "probe.json").write_text(probes("digit"))
    monkeypatch.setattr("skill_fairseq.cli.report.run_report", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main([str(tmp_path)])
    assert list((tmp_path / "report").iterdir()) == []


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("probe.json", '{"results": [{"model": "m", "task": "t", "metric": "accuracy"}]}', ["results[0]", "'value'"]),
        ("probe.json", probes("t").replace("0.5", "NaN"), ["results[0].value", "nan", "a finite number"]),
        ("probe.json", probes("t").replace("0.4, ", ""), ["results[0].interval", "[0.6]", "a list of 2"]),
        ("probe.json", "[" * 100_000, ["is not JSON", "nested too deeply"]),
        ("probe.json", "[]", ["[]", "results"]),
        ("probe.json", b"\xff{}", ["is not JSON"]),
        ("clusters/clusters.json", '{"groups": [[0]]}', ["'layers'"]),
        ("results.json", '{"baseline": "b", "rows": [3]}', ["'tasks'"]),
        ("stage1/.hydra/hydra.yaml", "hydra:\n  run:\n    dir: x\n", ["hydra: has no field 'job'"]),
        ("stage1/.hydra/hydra.yaml", "hydra: {job: {config_name", ["is not YAML"]),
        ("stage1/.hydra/overrides.yaml", "- a: 1\n", ["[0]", "text"]),
        ("stage1/.hydra/config.yaml", "- 1\n", ["[1]", "fields"]),
        ("stage1/.hydra/config.yaml", "date: 2001-99-99\n", ["is not YAML"]),
    ],
)
def test_a_damaged_file_is_named_in_one_line(
    file: str, content: Any, words: list[str], run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run_folder / "stage2", tmp_path / "stage1")
    (tmp_path / file).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and len(said) < 1000
    assert all(word in said for word in [str(tmp_path / file), *words, "make it again"])
    assert not (tmp_path / "report").exists()


def places(content: Any, where: tuple = ()) -> Iterator[tuple]:
    """Places of all values in nested dictionaries and lists; for long lists, of the first and last entries."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        if not isinstance(content, list) or key in (0, len(content) - 1):
            yield (*where, key)
            yield from places(value, (*where, key))


def changed(content: Any, where: tuple, value: Any) -> Any:
    """A copy with another value at a place, or without that place if the value is ``places``."""
    made = copy.deepcopy(content)
    inner = made
    for key in where[:-1]:
        inner = inner[key]
    if value is places:
        del inner[where[-1]]
    else:
        inner[where[-1]] = value
    return made


@pytest.fixture
def nothing_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing is slow, so it is skipped, but everything to draw is still computed."""

    def blank(path: Path, *args: Any, **options: Any) -> Path:
        path.write_bytes(b"")
        return path

    monkeypatch.setattr(pictures, "draw", blank)
    monkeypatch.setattr("skill_fairseq.reporting.run_report.plot_clusters", blank)


FILES = ["probe.json", "clusters/clusters.json", "results.json", "hydra", "config", "overrides"]


@pytest.mark.parametrize("file", FILES)
def test_no_field_that_is_missing_or_odd_ends_in_a_traceback(
    file: str, run_folder: Path, benchmark_folder: Path, tmp_path: Path, nothing_drawn: None
) -> None:
    """Removes or replaces every field in turn: the result is an error that names the file, or a page."""
    run, out = tmp_path / "run", tmp_path / "out"
    out.mkdir()
    source = benchmark_folder if file == "results.json" else run_folder
    for name in ("clusters", "stage1", "stage2", "probe.json", "results.json"):
        if (source / name).exists():
            (shutil.copytree if (source / name).is_dir() else shutil.copy)(source / name, run / name)
    path = run / file if "." in file else run / "stage1" / ".hydra" / f"{file}.yaml"
    read, write = (json.loads, json.dumps) if path.suffix == ".json" else (yaml.safe_load, yaml.safe_dump)
    content = read(path.read_text())
    if file == "config":  # without the files that it names: reading an encoder each time takes long
        content["task"] = {"teacher": "nowhere", "data": "nowhere"}
    tried = [(where, value) for where in places(content) for value in [places, *ODD]]
    pages = 0
    for where, value in random.Random(0).sample(tried, min(len(tried), 100)):
        path.write_text(write(changed(content, where, value)))
        try:
            folder = read_run_folder(run)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "make it again" in str(error), (where, value)
            continue
        text = benchmark_report(folder, out) if folder.benchmark is not None else run_report(folder, out, 1.0)
        pages += "</html>" in text
    assert pages


def test_a_damaged_file_is_an_error_or_a_page(run_folder: Path, tmp_path: Path, nothing_drawn: None) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    out.mkdir()
    for name in ("clusters", "stage1", "stage2", "probe.json"):
        (shutil.copytree if (run_folder / name).is_dir() else shutil.copy)(run_folder / name, run / name)
    shutil.rmtree(run / "stage1" / ".hydra" / "config.yaml", ignore_errors=True)
    (run / "stage1" / ".hydra" / "config.yaml").unlink()
    for name in ("probe.json", "clusters/clusters.json", "stage1/hydra_train.log", "stage1/.hydra/hydra.yaml"):
        whole = (run / name).read_bytes()
        dice = random.Random(name)
        for number in range(30):
            (run / name).write_bytes(spoiled(whole, number, dice))
            try:
                with bounds():
                    assert "</html>" in run_report(read_run_folder(run), out, 1.0)
            except ValueError as error:
                assert str(error).startswith(f"{run / name}: ")
        (run / name).write_bytes(whole)
