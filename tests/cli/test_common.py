"""Common behaviour of all commands: one-line errors, signals, output, devices and numbers."""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
import yaml
from messages import says

import skill_fairseq
from skill_fairseq.cli import _common
from skill_fairseq.cli._common import EXIT_CODES, Parser, check_device, in_range, run
from skill_fairseq.files import write_json

COMMANDS = sorted(f"skill_fairseq.cli.{file.stem}" for file in Path(_common.__file__).parent.glob("[a-z]*.py"))


def command(body: Callable[[], Any]) -> Callable[..., int]:
    @run
    def main(argv: Any = None) -> int:
        body()
        return 0

    return main


def raised(error: BaseException) -> Callable[[], Any]:
    def body() -> None:
        raise error

    return body


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            raised(ValueError("a.flac  b: two  blanks\nand \x1b[31mred")),
            r"error: a.flac  b: two  blanks\nand \x1b[31mred",
        ),
        (raised(OSError(2, "No such file", "x")), "error: [Errno 2] No such file: 'x'"),
        (
            lambda: importlib.import_module("no_such_module"),
            "error: No module named 'no_such_module'; run pip install '.'",
        ),
        (raised(ImportError("no libsomething", name="onnx")), "error: no libsomething; run pip install '.[onnx]'"),
        (lambda: torch.empty(1 << 60), "error: out of memory: "),
        (raised(MemoryError()), "error: out of memory: MemoryError"),
    ],
)
def test_what_the_user_can_mend_is_one_line(body: Any, said: str, capsys: pytest.CaptureFixture) -> None:
    assert command(body)([]) == 2
    error = capsys.readouterr().err
    assert error.startswith(said) and error.count("\n") == 1
    assert command(body)(["--debug"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback") and error.splitlines()[-1].startswith(said)


@pytest.mark.parametrize("body", [lambda: int("x"), lambda: torch.ones(2) + torch.ones(3), lambda: {}["x"]])
def test_a_defect_of_ours_keeps_its_traceback(body: Any) -> None:
    for arguments in ([], ["--debug"]):
        with pytest.raises((ValueError, RuntimeError, KeyError)):
            command(body)(arguments)


@pytest.mark.parametrize("module", COMMANDS)
def test_every_command_has_the_frame(module: str, capsys: pytest.CaptureFixture) -> None:
    main = importlib.import_module(module).main
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0 and "--debug" in capsys.readouterr().out
    assert main(["--no-such-option"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_what_is_printed_comes_after_the_files_and_shows_no_controls(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def body() -> None:
        print("name \x1b[31mred\u202e\nsecond line\tcell")
        assert capsys.readouterr().out == ""
        write_json(tmp_path / "a.json", [])
        print("now", flush=True)
        assert capsys.readouterr().out == "name \\x1b[31mred\\u202e\nsecond line\tcell\nnow\n"
        print("last")

    assert command(body)([]) == 0 and capsys.readouterr().out == "last\n"


PROGRAM = """
import sys
sys.modules["fairseq"] = None  # not needed here, and slow to import
from skill_fairseq.cli import _common
from skill_fairseq.cli._common import run
from skill_fairseq.files import atomic_write
@run
def main(argv=None):
    for i in range(100_000): print(i)
    print("\\u4f60")
    with atomic_write(sys.argv[1]) as temporary:
        temporary.write_text("whole")
        if "wait" in sys.argv:
            import time
            sys.stderr.write("ready\\n"); sys.stderr.flush()
            time.sleep(60)
    return 0
sys.exit(main())
"""


def program(*arguments: object, **options: Any) -> subprocess.Popen:
    words = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True, **options)


def test_a_reader_who_stops_costs_no_file_and_makes_no_noise(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    child = program(tmp_path / "a.json", stdout=writing)
    os.close(writing)
    _, error = child.communicate()
    assert child.returncode == 128 + signal.SIGPIPE and "Traceback" not in error and "Exception" not in error
    assert (tmp_path / "a.json").read_text() == "whole"


def test_an_output_that_cannot_say_it_costs_no_file(tmp_path: Path) -> None:
    child = program(tmp_path / "a.json", stdout=subprocess.PIPE, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    out, _ = child.communicate()
    assert child.returncode == 0 and out.endswith("\\u4f60\n") and (tmp_path / "a.json").read_text() == "whole"
    with open("/dev/full", "w") as full:
        child = program(tmp_path / "b.json", stdout=full)
    _, error = child.communicate()
    assert child.returncode == 2 and error.startswith("error: ") and "output" in error and "No space" in error
    assert (tmp_path / "b.json").read_text() == "whole"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_leave_no_temporary_file(tmp_path: Path, number: int) -> None:
    # A shell starts background jobs, such as these tests, with SIGINT ignored.
    default = functools.partial(signal.signal, number, signal.SIG_DFL)
    child = program(tmp_path / "a.json", "wait", stdout=subprocess.DEVNULL, preexec_fn=default)
    assert child.stderr is not None and child.stderr.readline() == "ready\n"
    assert [entry.name[:9] for entry in tmp_path.iterdir()] == [".a.skill-"]
    child.send_signal(number)
    _, error = child.communicate()
    said = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    assert (child.returncode, error) == (128 + number, f"{said}\n") and list(tmp_path.iterdir()) == []


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """As under nohup."""
    child = program(
        tmp_path / "a.json",
        "wait",
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    assert child.stderr is not None and child.stderr.readline() == "ready\n"
    child.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    child.communicate()
    assert child.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("device", ["foo", "", "mps", "meta", "cpu:1", "cuda:-1", "cuda:x", "CUDA", "cuda:0\n"])
def test_devices_that_are_none(device: str) -> None:
    with pytest.raises(ValueError, match=says(f"--device: {device!r}", "cuda:N")):
        check_device(device)


def test_devices_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    check_device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:9"):
        with pytest.raises(ValueError, match=says(f"--device: {device!r}", "no GPU")):
            check_device(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=says("--device: 'cuda:9'", "2 GPUs", "cuda:1")):
        check_device("cuda:9")


@pytest.mark.parametrize(
    ("limits", "good", "bad"),
    [
        ({"kind": int, "least": 1}, ["1", "7"], ["0", "-1", "1.5", "1e3", "nan", "", "x", "9" * 5000]),
        ({"kind": float, "least": 0, "below": 1}, ["0", "0.5"], ["1", "nan", "inf", "-0.1", "1e308", "1e999"]),
        ({"kind": float, "above": 0, "endless": True}, ["inf", "1e308"], ["0", "nan", "-inf"]),
        ({"kind": float, "above": 0, "most": 1}, ["1"], ["1.0001", "0"]),
    ],
)
def test_numbers_within_bounds(
    limits: dict[str, Any], good: list[str], bad: list[str], capsys: pytest.CaptureFixture
) -> None:
    parser = Parser(prog="skill-x")
    parser.add_argument("--some", type=in_range(**limits))
    for text in good:
        assert parser.parse_args(["--some", text]).some == limits["kind"](text)
    for text in bad:
        with pytest.raises(ValueError, match=says("--some", "number", "skill-x --help")):
            parser.parse_args([f"--some={text}"])


@pytest.mark.parametrize(
    ("module", "arguments", "option"),
    [
        ("manifest", ["audio", "file"], "OUT"),
        ("manifest", ["audio", "/proc/none"], "OUT"),
        ("cluster", ["--teacher", "none.pt", "--manifest", "none.tsv", "--out", "file"], "--out"),
        ("cluster", ["--teacher", "none.pt", "--manifest", "none.tsv", "--out", "n" * 256], "--out"),
        ("shrink", ["none.pt", "file/a.safetensors"], "OUT"),
        ("shrink", ["none.pt", "folder.safetensors"], "OUT"),
        ("export", ["none.pt", "file/a.safetensors"], "OUT"),
        ("export", ["none.pt", "/proc/none/a.onnx", "--to", "onnx"], "OUT"),
        ("export", ["none.pt", "file/folder", "--to", "s3prl"], "OUT"),
        ("export", ["none.pt", "/proc/none", "--to", "huggingface"], "OUT"),
        ("labels", ["m/train.tsv", "--transcripts", "text.tsv", "--out", "file"], "--out"),
        ("probe", ["none.pt", "--task", "none", "--plot", "/proc/none/a.png"], "--plot"),
        ("report", ["none", "--out", "file"], "--out"),
    ],
)
def test_outputs_that_cannot_be_written_are_refused_before_the_work(
    module: str,
    arguments: list[str],
    option: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """The inputs do not exist either, which the first reader would report."""
    monkeypatch.chdir(tmp_path)
    for folder in ("audio", "folder.safetensors", "m"):
        (tmp_path / folder).mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "m" / "train.tsv").write_text("/none\na.flac\t400\n")
    (tmp_path / "text.tsv").write_text("a\tHELLO\n")
    before = sorted(tmp_path.rglob("*"))
    assert importlib.import_module(f"skill_fairseq.cli.{module}").main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {option}: ") and error.count("\n") == 1 and ".skill-" not in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("module", COMMANDS)
def test_every_number_of_every_command_has_bounds(module: str) -> None:
    """Plain int and float would accept nan, inf and negative numbers."""

    def actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
        found = []
        for action in parser._actions:
            found += (
                [a for sub in action.choices.values() for a in actions(sub)]
                if isinstance(action, argparse._SubParsersAction)
                else [action]
            )
        return found

    parser = importlib.import_module(module)._parser()
    assert isinstance(parser, Parser)
    assert [action.dest for action in actions(parser) if action.type in (int, float) and action.choices is None] == []


@pytest.mark.parametrize("module", COMMANDS)
def test_every_command_says_its_version_and_exit_codes(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--version", "--help"):
        with pytest.raises(SystemExit):
            importlib.import_module(module).main([option])
    said = capsys.readouterr().out
    assert f"of skill_fairseq {skill_fairseq.__version__}\n" in said and EXIT_CODES in said


def test_one_version_everywhere() -> None:
    root = Path(__file__).resolve().parents[2]
    cited = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))["version"]
    newest = re.search(r"(?m)^## (\S+)", (root / "CHANGELOG.md").read_text(encoding="utf-8"))
    assert newest is not None and cited == newest.group(1) == skill_fairseq.__version__
