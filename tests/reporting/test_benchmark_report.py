"""The page on a benchmark."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import pytest
from messages import says

from skill_fairseq.comparison.table import introduction
from skill_fairseq.reporting.benchmark_report import benchmark_report
from skill_fairseq.reporting.run_folder import read_run_folder


@pytest.fixture(scope="module")
def made(benchmark_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp("made")
    return benchmark_report(read_run_folder(benchmark_folder), out), out


def test_tables_have_the_summarys_numbers(made: tuple, benchmark_folder: Path) -> None:
    lines = [re.findall(r"<td>(.*?)</td>", line) for line in re.findall(r"<tr>(.*?)</tr>", made[0])]
    for row in json.loads((benchmark_folder / "results.json").read_text())["rows"]:
        accuracy = "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * number for number in row["probes"]["digit"]))
        found = [line for line in lines if line[:1] == [row["method"]] and accuracy in line]
        assert found, row["method"]
        if row["method"] != "dphubert":
            difference = row["difference"]["digit"]
            said = "{:+.1f} [{:+.1f}, {:+.1f}] ".format(*(100 * number for number in difference["estimate"]))
            said += difference["verdict"]
            if difference["verdict"] == "not distinguishable":
                said += f" within \u00b1{100 * difference['within']:.1f}"
            assert any(said in line for line in found)
    costs = ["1,009,948", "1.117", "0.052"]
    assert ["teacher", "80.0 [73.9, 85.0]", *costs] in lines
    for sparsity in (0.5, 0.75):  # in the table of costs the teacher comes first
        table = made[0][made[0].index(f"<h2>Sparsity {sparsity}</h2>") :]
        table = table[table.index("<h3>Size and time</h3>") :]
        cells = [re.findall(r"<td>(.*?)</td>", line) for line in re.findall(r"<tr>(.*?)</tr>", table)[1:5]]
        assert [line[0] for line in cells] == ["teacher", "skill", "dphubert", "a_method_with_quite_a_long_name"]
        assert cells[0] == ["teacher", *costs, *["-"] * 6] and cells[1][1:4] == ["252,411", "0.368", "0.021"]


def test_the_verdict_says_who_wins_and_what_cannot_be_told(made: tuple) -> None:
    assert "<li><strong>skill</strong> against" in made[0]
    said = re.findall(r"<li>(.*?)</li>", re.sub("</?strong>", "", made[0]))
    skill = next(line for line in said if re.match("skill against dphubert, .*3 seeds", line))
    assert re.search(r"digit \+\d+\.\d \[\+.*\] points: higher", skill)
    other = next(line for line in said if line.startswith("a_method_with_quite_a_long_name"))
    assert re.search(r"digit [-+]\d+\.\d \[-.*, \+.*\] points: not distinguishable within \u00b1\d", other)


def test_the_page_says_what_intervals_mean_as_the_text_does(made: tuple, benchmark_folder: Path) -> None:
    said = introduction(json.loads((benchmark_folder / "results.json").read_text()))
    assert re.search(says("18 of 20", "digit", "accuracy", "200 recordings", "difference to dphubert", "paired"), said)
    assert f"<p>{said}</p>" in made[0]


def test_what_is_not_there_yet_is_named(made: tuple) -> None:
    left_out = made[0][made[0].index("<h2>Left out</h2>") :]
    assert "2 of 20" in left_out and "skill-0.875-1: failed" in left_out


def test_pictures_of_differences_and_distances(made: tuple) -> None:
    names = {file.name for file in made[1].glob("*.png")}
    for sparsity in ("0.5", "0.75", "all"):
        assert f"difference_digit_{sparsity}.png" in names and f"distance_cos_{sparsity}.png" in names
    assert "<script" not in made[0] and not re.search(r"(?:src|href)=[\"'](?!data:image/png;base64,|#)", made[0])


def test_a_picture_says_what_its_colours_and_arrows_mean(made: tuple, benchmark_folder: Path, tmp_path: Path) -> None:
    plain = "in colour: intervals that exclude 0"
    captions = r"<figcaption>(.*?)</figcaption>"
    assert re.findall(captions, made[0]) == [plain] * 3  # of two methods, both are shown
    summary = json.loads((benchmark_folder / "results.json").read_text())
    row = next(row for row in summary["rows"] if row["method"] == "skill")
    difference = {"digit": {"estimate": [-0.6, -0.7, -0.5], "verdict": "lower", "within": 0.7}}
    summary["rows"].append({**row, "method": "far_off", "difference": difference})
    (tmp_path / "results.json").write_text(json.dumps(summary))
    found = re.findall(captions, benchmark_report(read_run_folder(tmp_path), tmp_path))
    assert found == [f"{plain}; \u25c2 \u25b8: beyond the axis", plain, plain]


def test_without_intervals_it_says_why(benchmark_folder: Path, tmp_path: Path) -> None:
    summary = json.loads((benchmark_folder / "results.json").read_text())
    summary["tasks"]["digit"]["no_interval"] = "2 speakers, an interval needs 3 or more"
    for row in summary["rows"]:
        row["probes"]["digit"][1:] = [None, None]
        if row["difference"]:
            row["difference"]["digit"] = {"estimate": [0.1, None, None], "verdict": "no interval", "within": None}
    (tmp_path / "results.json").write_text(json.dumps(summary))
    page = benchmark_report(read_run_folder(tmp_path), tmp_path)
    assert re.search("<figcaption>no interval: 2 speakers.*3.*</figcaption>", page)
    assert re.search(r"Without an interval.*digit \(2 ", page) and "<td>+10.0 (no interval)</td>" in page


def test_the_command_to_repeat_it(made: tuple) -> None:
    wanted = "--methods skill dphubert a_method_with_quite_a_long_name --sparsities 0.5 0.75 --seeds 1 2 3"
    assert wanted in unescape(re.sub("</?span>", "", made[0]))


def test_results_without_rows_are_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match=says("results.json", "rows")):
        read_run_folder(tmp_path)
