"""Common to all commands: --json, help texts, names of options, errors and progress bars."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from skill_fairseq.checkpoints import save_encoder
from skill_fairseq.cli import _common
from skill_fairseq.cli._common import Parser
from tests.conftest import random_encoder

COMMANDS = sorted(file.stem for file in Path(_common.__file__).parent.glob("[a-z]*.py"))


class Command(NamedTuple):
    """A command, or one of its parts such as `skill-bench train`."""

    name: str
    words: list[str]
    parser: Parser

    def run(self, *arguments: object) -> int:
        return importlib.import_module(f"skill_fairseq.cli.{self.name}").main([*self.words, *map(str, arguments)])

    def options(self) -> Iterator[argparse.Action]:
        """Those that --help shows."""
        return (action for action in self.parser._actions if action.help != argparse.SUPPRESS)


def _commands() -> Iterator[Command]:
    for name in COMMANDS:
        parser = importlib.import_module(f"skill_fairseq.cli.{name}")._parser()
        parts = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        if not parts:
            yield Command(name, [], parser)
        for part, sub in parts[0].choices.items() if parts else ():
            yield Command(name, [part], sub)


EVERY = [pytest.param(command, id=" ".join([command.name, *command.words])) for command in _commands()]


@pytest.fixture(scope="module")
def inputs(teacher_file: Path, speech: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the input of the commands below."""
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copytree(speech, folder, dirs_exist_ok=True)
    shutil.copy(teacher_file, folder / "student.safetensors")
    save_encoder(random_encoder(pruning_units=["heads", "ffn"]), folder / "gated.safetensors")
    names = [f"valid/{number}" for number in range(6)]
    (folder / "text.tsv").write_text("".join(f"{name}.wav\tA B\n" for name in names))
    (folder / "pairs").mkdir()
    manifest = (folder / "valid.tsv").read_text().splitlines()
    (folder / "pairs" / "test.tsv").write_text("\n".join([str(folder), *manifest[1:]]) + "\n")
    trials = [
        "same\tutterance_a\tutterance_b",
        f"1\t{names[0]}.wav\t{names[1]}.wav",
        f"0\t{names[0]}.wav\t{names[2]}.wav",
    ]
    (folder / "pairs" / "trials.tsv").write_text("\n".join(trials) + "\n")
    entry = {"model": "a", "task": "t", "metric": "accuracy", "value": 0.5, "right": "01", "speakers": ["x", "y"]}
    for seed in "12":
        (folder / f"{seed}.json").write_text(json.dumps({"results": [entry]}))
    return folder


SMALL = "--model student.safetensors --seconds 0.5 --repeats 1 --warmup 0"
LINES = {
    "bench cluster": SMALL,
    "bench load": "--manifest valid.tsv --max-seconds 1 --min-sample-size 0",
    "bench table": f"{SMALL} --points 1 --checks 0",
    "cluster": "--teacher student.safetensors --manifest valid.tsv --num-groups 2 --out OUT",
    "compare": "1.json 2.json --baseline a",
    "export": "student.safetensors OUT/a.safetensors --accuracy valid.tsv",
    "features": "mfcc valid.tsv OUT",
    "info": "student.safetensors",
    "labels": "valid.tsv --transcripts text.tsv --out OUT",
    "manifest": "train OUT",
    "probe": "logmel --task pairs",
    "report": ". --out OUT",
    "shrink": "gated.safetensors OUT/a.safetensors --sparsity 0.3",
}
ELSEWHERE = {"bench infer", "bench train"}
"""They start processes, which takes long: test_bench.py looks at what they print."""


@pytest.mark.parametrize("line", LINES)
def test_json_is_one_document_with_the_names_of_the_help(
    line: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    command = next(c for c in _commands() if line == " ".join([c.name, *c.words]))
    monkeypatch.chdir(inputs)
    words = LINES[line].replace("OUT", str(tmp_path / "out")).split()
    assert command.run(*words, "--json") == 0
    printed = capfd.readouterr()
    assert set(json.loads(printed.out)) == set(command.parser.prints or ())
    assert printed.err.strip() and not re.search(r"\r|\d(it|utt|s audio)/s", printed.err)  # text, no progress bar


def test_every_command_is_in_the_table() -> None:
    assert {*LINES, *ELSEWHERE} == {command.id for command in EVERY}


@pytest.mark.parametrize("line", ["bench cluster", "bench load", "cluster", "features"])
def test_a_terminal_has_progress_bars(
    line: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(inputs)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    name, *part = line.split()
    words = LINES[line].replace("OUT", str(tmp_path / "out")).split()
    assert importlib.import_module(f"skill_fairseq.cli.{name}").main([*part, *words]) == 0
    printed = capsys.readouterr()
    assert "\r" in printed.err and "\r" not in printed.out and "error" not in printed.err


def test_libraries_and_children_do_not_write_between(capfd: pytest.CaptureFixture[str]) -> None:
    """Writes to descriptor 1, bypassing Python's sys.stdout."""

    @_common.run
    def main(argv: Any = None) -> _common.Done:
        os.write(1, b"a library\n")
        print("text")
        return _common.Done({"a": 1}, 1)

    assert main(["--json"]) == 1
    assert capfd.readouterr() == ('{\n "a": 1\n}\n', "a library\ntext\n")
    assert main([]) == 1
    assert capfd.readouterr() == ("a library\ntext\n", "")


def test_json_may_go_to_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    """The text stays on stdout. A word after --json that neither ends in .json nor is a device is no such file: an
    encoder that is named there is not overwritten."""
    seen: list[list[str]] = []

    @_common.run
    def main(argv: Any = None) -> _common.Done:
        seen.append(argv)
        print("text")
        return _common.Done({"a": 1})

    monkeypatch.chdir(tmp_path)
    for words in (["student.pt", "--json", "a.json"], ["--json=a.json", "student.pt"]):
        assert main(words) == 0 and capfd.readouterr() == ("text\n", "")
        assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
        (tmp_path / "a.json").unlink()
    assert [sorted(words) for words in seen] == [["--json", "student.pt"]] * 2
    assert main(["--json", "/dev/null"]) == 0 and capfd.readouterr() == ("text\n", "")
    (tmp_path / "folder").mkdir()
    for words in (["--json", "folder"], ["--json", "a.json", "b.json"]):  # the second: inputs of a command
        assert main(words) == 0 and json.loads(capfd.readouterr().out) == {"a": 1}
        assert seen[-1] == words and not (tmp_path / "a.json").exists()
    assert main(["--json="]) == 2 and "--json=FILE" in capfd.readouterr().err
    (tmp_path / "student.pt").write_text("weights")
    assert main(["--json", "student.pt"]) == 0 and json.loads(capfd.readouterr().out) == {"a": 1}
    assert (tmp_path / "student.pt").read_text() == "weights" and seen[-1] == ["--json", "student.pt"]


def test_a_json_file_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    @_common.run
    def main(argv: Any = None) -> _common.Done:
        raise AssertionError("it began")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "input.json").write_text("{}")
    for words in (["--json", "file/a.json"], ["input.json", "--json", "input.json"]):
        assert main(words) == 2
        assert re.fullmatch(r"error: --json.*\n", capfd.readouterr().err)


VERBS = "also allow decode draw find fix give keep leave make measure only print probe read say show upload warn write"
UNITS = re.compile("seconds|percent|fraction|samples|Hz|GB|number of|seed of|the measure's unit")


def test_help_texts_are_noun_phrases_with_units() -> None:
    for command in _commands():
        for option in command.options():
            text, where = option.help or "", f"{command.parser.prog}: {option.dest}: {option.help!r}"
            if option.dest != "help":
                assert text and not text.endswith("."), where
                assert text.split()[0] not in VERBS.split() or text.startswith("leave to"), (
                    f"{where} begins with a verb"
                )
            if getattr(option.type, "__qualname__", "").startswith("in_range."):
                assert UNITS.search(text), f"{where} has no unit"


def test_one_name_for_one_thing() -> None:
    """An option has the same value and unit in every command, and equal explanations have equal names."""
    values: dict[str, set[Any]] = {}
    names: dict[str, set[str]] = {}
    for command in _commands():
        for option in filter(lambda option: option.option_strings, command.options()):
            name, text = option.option_strings[-1], str(option.help).partition(" (default")[0]
            unit = UNITS.search(text)
            values.setdefault(name, set()).add((option.metavar, option.nargs == 0, unit and unit[0]))
            names.setdefault(text, set()).add(name)
    assert {name: found for name, found in values.items() if len(found) > 1} == {}
    assert {text: found for text, found in names.items() if len(found) > 1} == {}


@pytest.mark.parametrize("command", EVERY)
def test_errors_are_one_line_on_stderr(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """An unknown option, an option without its value, and missing input."""
    monkeypatch.chdir(tmp_path)
    line = LINES.get(" ".join([command.name, *command.words]), "--device cuda:99").replace("OUT", "out")
    for words in (["--no-such-option"], ["--seed"], ["--jso"], line.split()):
        for more in ([], ["--json"]):
            assert command.run(*words, *more) == 2
            printed = capfd.readouterr()
            assert printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1, words
    assert list(tmp_path.iterdir()) == []
