"""What all commands share: their frame, their parser, and options that are checked before any work."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import math
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, Callable, NamedTuple, NoReturn

import torch

import skill_fairseq
from skill_fairseq.files import check_output, json_text, write_json
from skill_fairseq.messages import meant_for_users, not_utf8, out_of_memory, printable, remedy_for, require_linux
from skill_fairseq.text_tables import aligned

Main = Callable[..., int]
MAX_SEED = 2**32 - 1  # numpy's


class Done(NamedTuple):
    """What a command has done.

    Attributes:
        record: what `--json` prints; its names are those that the parser's `prints` explains.
        code: exit code.
    """

    record: Mapping[str, Any]
    code: int = 0


class Ended(BaseException):
    """A signal asked the process to end; its number is the argument."""


class _Held(io.StringIO):
    """What a command prints, held back until its files are written; a flush lets it through at once."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self._stream = stream

    def flush(self) -> None:
        text = self.getvalue()
        self.seek(0)
        self.truncate()
        if text and self._stream is not None:
            encoding = getattr(self._stream, "encoding", None) or "utf-8"
            self._stream.write(printable(text, keep="\n\t").encode(encoding, "backslashreplace").decode(encoding))
            self._stream.flush()


def run(main: Callable[..., int | Done], json_file: bool = True) -> Main:
    """Decorate a command's `main(argv=None)`: what the user can mend becomes one line on stderr and exit code 2.

    Errors that are meant for users, see :func:`skill_fairseq.messages.meant_for_users`, are reported without a
    traceback unless `--debug` is given; any other exception is a defect of ours and keeps its traceback. What is
    printed appears when the command ends, so that a reader who stops (`| head`) costs no file. With `--json` it goes
    to stderr, and stdout gets only the record of :class:`Done`; with `--json FILE` the record goes to the file. Ctrl-C,
    SIGTERM and SIGHUP end the command by way of every clean-up, with exit code 128 + the signal's number as shells
    expect.

    Args:
        main: the command.
        json_file: whether `--json FILE` is understood; not where inputs are JSON too, there only `--json=FILE` is.
    """

    @functools.wraps(main)
    def guarded(argv: Sequence[str] | None = None) -> int:
        arguments = list(sys.argv[1:] if argv is None else argv)
        debug, file = "--debug" in arguments, _json_file(arguments, json_file)
        as_json = "--json" in arguments and file is None
        document, held = _Held(sys.stdout), _Held(sys.stderr if as_json else sys.stdout)
        try:
            with _signals_raise(), contextlib.redirect_stdout(held), _only_stderr(as_json):
                require_linux("skill_fairseq's commands")
                if file == "":
                    raise ValueError("--json=: no file; expected --json=FILE, or --json for stdout")
                if file is not None:
                    check_output(file, "--json", [word for word in arguments if os.path.isfile(word)])
                done = main([word for word in arguments if word != "--debug"])
                code = done.code if isinstance(done, Done) else done
                if file is not None and isinstance(done, Done):
                    write_json(file, done.record)
                elif as_json and isinstance(done, Done):
                    document.write(json_text(done.record))
        except Exception as error:
            if not meant_for_users(error, main.__module__.partition(".")[0]):
                _let_through(held)
                raise
            if debug:
                traceback.print_exc()
            _let_through(held)
            _say(f"error: {_describe(error)}")
            return 2
        except KeyboardInterrupt:
            _say("interrupted")
            return 128 + signal.SIGINT
        except Ended as ended:
            number = int(ended.args[0])
            _say(f"ended by {signal.Signals(number).name}")
            return 128 + number
        except SystemExit:  # of --help
            held.flush()
            raise
        return _let_through(document) or _let_through(held) or code

    return guarded


def _json_file(arguments: list[str], may_follow: bool) -> str | None:
    """Takes the FILE of `--json=FILE` or, if it may follow, `--json FILE` out of the arguments.

    After `--json` a word that ends in .json, or a device, is the file, if it is the last word or an option comes next.
    """
    for index, word in enumerate(arguments):
        if word.startswith("--json="):
            arguments[index] = "--json"
            return word.partition("=")[2]
        if word == "--json" and may_follow:
            after, rest = arguments[index + 1 : index + 2], arguments[index + 2 : index + 3]
            if after and (not rest or rest[0].startswith("-")) and (after[0].endswith(".json") or _is_device(after[0])):
                return arguments.pop(index + 1)
    return None


def _is_device(word: str) -> bool:
    return os.path.exists(word) and not os.path.isdir(word) and not os.path.isfile(word)


def _let_through(held: _Held) -> int:
    """The exit code that printing ends in: 0, or that of a reader who has gone, or of an output that is full."""
    try:
        held.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains as it ends
        return 128 + signal.SIGPIPE
    except OSError as error:
        _say(f"error: the output cannot be printed: {_describe(error)}")
        return 2
    return 0


@contextlib.contextmanager
def _only_stderr(wanted: bool) -> Iterator[None]:
    """What libraries and child processes write to descriptor 1, past ``sys.stdout``, goes to stderr."""
    if not wanted:
        yield
        return
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _say(message: str) -> None:
    with contextlib.suppress(OSError):
        print(printable(message), file=sys.stderr)


def _describe(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    if isinstance(error, ImportError):
        return f"{text}; run {remedy_for((error.name or '').partition('.')[0])}"
    if out_of_memory(error):
        return f"out of memory: {text.splitlines()[0]}; free some, or give the command less at a time"
    if isinstance(error, UnicodeEncodeError) and not_utf8(error):
        return f"{error.object} is no name in UTF-8; rename the file or folder"
    return text


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP raise :class:`Ended`, so that temporary files go; a signal that is ignored stays so."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        for other in previous:
            signal.signal(other, signal.SIG_IGN)  # no second one disturbs the clean-up
        raise Ended(number)

    previous: list[int] = []
    if threading.current_thread() is threading.main_thread():
        previous += [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    for number in previous:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in previous:
            signal.signal(number, signal.SIG_DFL)


EXIT_CODES = """exit codes: 0 done; 1 done in part, stderr says what is missing; 2 an error that you can fix;
128 + N ended by signal N (130: Ctrl-C)"""


class Parser(argparse.ArgumentParser):
    """argparse's, with `--debug`, `--version`, an epilog as it is written, and errors of one line that name the option.

    Args:
        epilog: examples and the like.
        prints: what the object that `--json` prints holds: name -> meaning; without, there is no `--json`.
    """

    def __init__(self, epilog: str = "", prints: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        parts = [epilog.strip()]
        if prints is not None:
            rows = aligned([[f"  {name}", meaning] for name, meaning in prints.items()], left=2)
            parts.append(f"--json prints one object, with all of these names:\n{rows}")
        kwargs = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **kwargs}
        super().__init__(epilog="\n\n".join(filter(None, [*parts, EXIT_CODES])), **kwargs)
        self.prints = prints
        if prints is not None:
            self.add_argument(
                "--json", action="store_true", help="JSON on stdout, the text on stderr; --json FILE.json: in a file"
            )
        self.add_argument("--debug", action="store_true", help="the place in the code that an error comes from")
        version = f"%(prog)s of skill_fairseq {skill_fairseq.__version__}"
        self.add_argument("--version", action="version", version=version, help="name and version of this program")

    def error(self, message: str) -> NoReturn:
        """Raises ValueError."""
        raise ValueError(f"{message.removeprefix('argument ')}; see {self.prog} --help")

    def add_trust(self) -> None:
        """Adds `--trust`."""
        what = "leave to read checkpoints with unknown pickled classes, which can run code that their author put there"
        self.add_argument("--trust", action="store_true", help=what)

    def add_device(self) -> None:
        """Adds `--device`, for :func:`check_device`."""
        self.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")

    def add_seed(self, what: str, default: int = 0) -> None:
        """Adds `--seed`, which numpy and torch take."""
        text = f"seed of {what} (default: {default})"
        self.add_argument("--seed", type=seed, default=default, metavar="N", help=text)


def in_range(
    kind: Callable[[str], Any],
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    endless: bool = False,
) -> Callable[[str], Any]:
    """For argparse's `type`: a finite number within bounds.

    Args:
        kind: int or float.
        least, most: bounds that belong to the range.
        above, below: bounds that do not.
        endless: whether infinity will do.
    """
    bounds = [("at least", least), ("above", above), ("at most", most), ("below", below)]
    limits = " and ".join(f"{word} {bound:,}" for word, bound in bounds if bound is not None)
    noun = "a whole number" if kind is int else "a number"

    def convert(text: str) -> Any:
        expected = f"; expected {noun}{' ' if limits else ''}{limits}"
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}{expected}") from None
        finite = kind is int or math.isfinite(value) or (endless and value == math.inf)
        low = (least is None or value >= least) and (above is None or value > above)
        if not (finite and low and (most is None or value <= most) and (below is None or value < below)):
            raise argparse.ArgumentTypeError(f"{value}{expected}")
        return value

    return convert


def layer_numbers(text: str, depth: int, others: str) -> list[int]:
    """Layers that `--layers` names by number.

    Args:
        text: numbers with commas between them.
        depth: of the encoder, its last layer.
        others: what else the option takes, for the message.

    Raises:
        ValueError: these are no such numbers, or one stands twice.
    """
    words = text.split(",")
    numbers = [int(word) for word in words if word.isascii() and word.isdigit() and int(word) <= depth]
    if len(numbers) < len(words) or len(set(numbers)) < len(numbers):
        raise ValueError(f"--layers: {text!r}; expected {others}, or different numbers from 0 to {depth} as in 6,9")
    return numbers


seed = in_range(int, least=0, most=MAX_SEED)
"""A seed that numpy and torch take."""


def check_device(device: str) -> None:
    """Makes sure, before any work, that `--device` names a device that is there and works.

    Raises:
        ValueError: it does not.
    """
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", device)
    if match is None:
        raise ValueError(f"--device: {device!r}; expected cpu, cuda or cuda:N")
    if device == "cpu":
        return
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not there:
        raise ValueError(f"--device: {device!r}, but torch sees no GPU here, expected 'cpu'; leave --device out")
    if int(match[1] or 0) >= there:
        raise ValueError(f"--device: {device!r}, but torch sees {there} GPUs here, expected cuda:0 to cuda:{there - 1}")
    try:
        torch.zeros(1, device=device)
    except RuntimeError as error:
        raise ValueError(f"--device: {device!r} cannot be used ({str(error).splitlines()[0]})") from error
