"""Lets stock fairseq 0.12.2 (hydra-core 1.0.7, omegaconf 2.0.6) run on Python 3.10-3.13 and torch >= 2.6.

``skill_fairseq_hook.pth`` in site-packages starts this module with every Python of the environment: in
``fairseq-hydra-train``, torchrun, spawned children and Slurm jobs. It does nothing until fairseq, hydra, omegaconf or
antlr4 is imported, and nothing at all if omegaconf is not 2.0.x; ``SKILL_FAIRSEQ_HOOK=0`` in the environment switches
it off. A failing patch prints a message and breaks no import.

It is installed at the top level, beside the package, and must not import torch, fairseq or skill_fairseq.
Each function below that takes no argument, or one module, is one patch, named after what it does; its
docstring quotes the error that it fixes.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # not from typing, whose import takes time
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

PACKAGES = ("antlr4", "fairseq", "fairseq_cli", "hydra", "omegaconf")
USER_DIR = "SKILL_FAIRSEQ_USER_DIR"
FOUND = "SKILL_FAIRSEQ_FOUND"


def install() -> None:
    """Starts the hook, once; does nothing if ``SKILL_FAIRSEQ_HOOK=0``."""
    if os.environ.get("SKILL_FAIRSEQ_HOOK") != "0" and Finder not in sys.meta_path:
        sys.meta_path.insert(0, Finder)  # type: ignore[arg-type]


class Finder:
    """Entry of ``sys.meta_path`` that patches each of ``PACKAGES`` on its first import."""

    started = False

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Spec of a module to patch after it has run; None leaves the import to the other finders."""
        if name.partition(".")[0] not in PACKAGES:
            return None
        if not cls.started:
            cls.started = True
            if not _old_omegaconf():
                sys.meta_path.remove(cls)  # type: ignore[arg-type]
                return None
            for patch in BEFORE:
                contained(patch)
        return contained(_spec_with_patches, name, path, AFTER[name]) if name in AFTER else None


def _old_omegaconf() -> bool:
    from importlib.metadata import version

    try:
        return version("omegaconf").startswith("2.0.")
    except Exception:  # its metadata is missing or damaged
        return False


def contained(patch: Callable[..., Any], *args: Any) -> Any:
    """Calls a patch; if it fails, prints to stderr and returns None, so that the import continues."""
    try:
        return patch(*args)
    except Exception as error:
        if sys.stderr:
            what = f"{patch.__name__} failed ({type(error).__name__}: {error})"
            sys.stderr.write(f"skill_fairseq's start-up hook: {what}; SKILL_FAIRSEQ_HOOK=0 switches the hook off\n")
        return None


def _spec_with_patches(
    name: str, path: Sequence[str] | None, patches: Sequence[Callable[[ModuleType], None]]
) -> ModuleSpec | None:
    from importlib.machinery import PathFinder

    spec = PathFinder.find_spec(name, path)
    if spec is None or spec.loader is None:
        return None
    run = spec.loader.exec_module

    def run_and_patch(module: ModuleType) -> None:
        run(module)
        for patch in patches:
            contained(patch, module)

    spec.loader.exec_module = run_and_patch  # type: ignore[method-assign]
    return spec


class View:
    """A module as one importer sees it, with a few names replaced."""

    def __init__(self, module: ModuleType, **replaced: Any) -> None:
        self.__dict__.update(replaced, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


# Before the first of the packages is imported


def allow_dataclass_defaults() -> None:
    """Python >= 3.11, importing hydra or fairseq.

    "ValueError: mutable default <class '...CommonConfig'> for field common is not allowed: use
    default_factory". The check asks whether the default's class can be hashed: give the config classes of
    these packages the hash of ``object`` when they serve as a default.
    """
    if sys.version_info < (3, 11):
        return
    import dataclasses

    check = dataclasses._get_field  # type: ignore[attr-defined]

    def get_field(cls: type, name: str, *args: Any, **kwargs: Any) -> Any:
        default = getattr(cls, name, None)
        if isinstance(default, dataclasses.Field):
            default = default.default
        kind = type(default)
        if cls.__module__.partition(".")[0] in PACKAGES and dataclasses.is_dataclass(kind) and kind.__hash__ is None:
            kind.__hash__ = object.__hash__  # type: ignore[assignment]
        return check(cls, name, *args, **kwargs)

    dataclasses._get_field = get_field  # type: ignore[attr-defined]


def restore_find_module() -> None:
    """Python >= 3.12, hydra scanning its plugins.

    "AttributeError: 'FileFinder' object has no attribute 'find_module'": implement it with ``find_spec``.
    """
    from importlib.machinery import FileFinder

    if hasattr(FileFinder, "find_module"):
        return

    def find_module(self: FileFinder, fullname: str, path: str | None = None) -> Any:
        spec = self.find_spec(fullname)
        return spec and spec.loader

    FileFinder.find_module = find_module  # type: ignore[method-assign, assignment]


def restore_typing_io() -> None:
    """Python >= 3.13, antlr4 4.8 and hydra's grammar.

    "ModuleNotFoundError: No module named 'typing.io'": add a module with its three names.
    """
    if sys.version_info < (3, 13):
        return
    import types
    import typing

    module = types.ModuleType("typing.io")
    vars(module).update(IO=typing.IO, TextIO=typing.TextIO, BinaryIO=typing.BinaryIO)
    sys.modules.setdefault("typing.io", module)


def name_user_dir() -> None:
    """Sets ``SKILL_FAIRSEQ_USER_DIR`` to the folder of the installed skill_fairseq, unless the user has set it.

    Our configs have ``common.user_dir: ${env:SKILL_FAIRSEQ_USER_DIR,skill_fairseq}``: without the variable, fairseq
    looks for ``skill_fairseq`` in the working directory, then beside itself in site-packages, and an editable install
    is in neither ("FileNotFoundError: .../skill_fairseq"). The package is located, not imported. A second variable
    distinguishes a value from a parent process's hook from the user's.
    """
    from importlib.util import find_spec

    if os.environ.get(USER_DIR) != os.environ.get(FOUND):
        return
    spec = find_spec("skill_fairseq")
    if spec is not None and spec.origin and spec.submodule_search_locations:
        os.environ[USER_DIR] = os.environ[FOUND] = spec.submodule_search_locations[0]


def requeue_from_start_up() -> None:
    """One of our trainings gets SIGTERM, SIGUSR1 or SIGUSR2 while it imports, or loads teacher and data.

    No error, but the signal's exit code (143, 138, 140) would look like a failure. Exits with 75, as during training,
    and writes the file that ``SKILL_PREEMPTED_FILE`` names, until the trainer handles the signals. SIGTERM to one of
    several tasks keeps its default: srun and torchrun send it to the other tasks when one fails.
    """
    program = os.path.basename(sys.argv[0] if sys.argv else "")
    if program not in ("fairseq-hydra-train", "fairseq-train", "hydra_train.py", "train.py") or not _ours(sys.argv[1:]):
        return
    import signal
    import threading

    if threading.current_thread() is not threading.main_thread():
        return

    def leave(number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        if os.environ.get("SKILL_PREEMPTED_FILE"):
            with open(os.environ["SKILL_PREEMPTED_FILE"], "w", encoding="utf-8") as file:
                file.write(name + "\n")
        message = f"stopping because of {name}: training had not started; run the same command again\n"
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(2, message.encode())
        os._exit(75)  # the importing code could catch an exception

    leave.start_up = True  # type: ignore[attr-defined]
    counts = [os.environ.get(name, "") for name in ("WORLD_SIZE", "SLURM_NTASKS")]
    several = any(count.isdigit() and int(count) > 1 for count in counts)
    for number in (signal.SIGUSR1, signal.SIGUSR2) if several else (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, leave)


def _ours(arguments: Sequence[str]) -> bool:
    """Whether a fairseq command line names a single run with skill_fairseq as user dir, directly or in its config."""
    values: dict[str, str] = {}
    for word, following in zip(arguments, [*arguments[1:], ""]):
        key, equals, value = word.partition("=")
        values[key] = value if equals else following
    if "-m" in values or "--multirun" in values:
        return False
    folder = values.get("--config-dir", values.get("-cd"))
    name = values.get("--config-name", values.get("-cn", ""))
    text = values.get("common.user_dir", "") + values.get("--user-dir", "")
    if folder is not None and name:
        path = os.path.join(folder, name if name.endswith(".yaml") else name + ".yaml")
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                text += file.read()
        except OSError:  # hydra will report it
            pass
    return "skill_fairseq" in text.lower()


# After a module of the packages has run


def print_exceptions(hydra_utils: ModuleType) -> None:
    """Python >= 3.10, any crash under ``hydra.main``.

    "TypeError: print_exception() got an unexpected keyword argument 'etype'" hides the original error: pass the
    arguments by position.
    """
    import traceback

    def print_exception(etype: object, value: BaseException, tb: Any) -> None:
        traceback.print_exception(type(value), value, tb)

    hydra_utils.print_exception = print_exception  # type: ignore[attr-defined]


def load_checkpoints(module: ModuleType) -> None:
    """torch >= 2.6, fairseq loading a checkpoint.

    "UnpicklingError: Weights only load failed": fairseq's checkpoints hold DictConfig, Namespace and Dictionary.
    In ``fairseq.checkpoint_utils``, ``torch.load`` now reads tensors and objects of known harmless classes, with any
    torch, and refuses others by name, because their code would run. ``SKILL_FAIRSEQ_TRUST=1`` reads any.
    """
    load = module.torch.load

    def load_checkpoint(file: Any, *args: Any, **kwargs: Any) -> Any:
        if "weights_only" in kwargs or not hasattr(file, "seek"):
            return load(file, *args, **kwargs)
        reader = None if os.environ.get("SKILL_FAIRSEQ_TRUST") == "1" else checkpoint_reader()
        if reader is None:
            return load(file, *args, **_any_pickle(load), **kwargs)
        try:
            return reader.read(file, real_classes=True)
        except reader.Refused as error:
            raise ValueError(
                f"{getattr(file, 'name', 'the checkpoint')}: holds an object of class {error.name}, which is not read "
                "because it could run code; if you trust its source, set SKILL_FAIRSEQ_TRUST=1 in the "
                "environment"
            ) from error

    module.torch = View(module.torch, load=load_checkpoint)  # type: ignore[attr-defined]


def checkpoint_reader() -> Any:
    """skill_fairseq's reader of torch files, loaded standalone: the package would register its parts with fairseq.

    None if skill_fairseq is not installed.
    """
    from importlib.util import find_spec, module_from_spec, spec_from_file_location

    name = "_skill_fairseq_unpickling"
    if name not in sys.modules:
        package = find_spec("skill_fairseq")
        if package is None or not package.submodule_search_locations:
            return None
        path = os.path.join(package.submodule_search_locations[0], "checkpoints", "unpickling.py")
        spec = spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


def _any_pickle(load: Callable[..., Any]) -> dict[str, bool]:
    """The argument that makes torch.load read any pickle; torch < 1.13 always does, and has no argument."""
    from inspect import signature

    return {"weights_only": False} if "weights_only" in signature(load).parameters else {}


def load_from_other_ranks(module: ModuleType) -> None:
    """torch >= 2.6, fairseq sending an object to the other processes of a run.

    "UnpicklingError: Weights only load failed": in ``fairseq.distributed.utils``, ``torch.load`` keeps its old default.
    Its input comes from another rank of the same run, not from a file.
    """
    load = module.torch.load

    def load_with_old_default(*args: Any, **kwargs: Any) -> Any:
        return load(*args, **{**_any_pickle(load), **kwargs})

    module.torch = View(module.torch, load=load_with_old_default)  # type: ignore[attr-defined]


def pass_signals_on(module: ModuleType) -> None:
    """One of our runs on one node with several GPUs, whose processes fairseq spawned, gets SIGTERM or SIGUSR1.

    No error, but the signal would kill the parent, and with it the ranks in the middle of an update. Forwards signals
    to the ranks, and passes on 75, the exit code of ranks that wrote a checkpoint and want to be restarted.
    """
    torch = module.torch
    spawn = torch.multiprocessing.spawn

    def spawn_and_pass_on(fn: Any, args: Any = (), nprocs: int = 1, join: bool = True, **kwargs: Any) -> Any:
        import signal
        import threading

        ours = _is_ours(*args[1:2])  # fairseq passes the function to run, the config, and more
        if not ours or not join or threading.current_thread() is not threading.main_thread():
            return spawn(fn, args=args, nprocs=nprocs, join=join, **kwargs)
        ranks = spawn(fn, args=args, nprocs=nprocs, join=False, **kwargs)
        received: list[int] = []

        def pass_on(number: int, frame: Any) -> None:
            received.append(number)
            for process in ranks.processes:
                if process.is_alive():
                    os.kill(process.pid, number)

        signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
        before = {int(number): signal.signal(number, pass_on) for number in signals}
        try:
            while not ranks.join():
                pass
        except torch.multiprocessing.ProcessExitedException as error:
            if error.exit_code != 75 and -error.exit_code not in received:  # a rank that never installed its handler
                raise
            for handler in {before[number] for number in received}:
                if callable(handler) and not hasattr(handler, "start_up"):  # submitit's requeues the job
                    handler(received[-1], None)
            sys.exit(75)
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    module.torch = View(torch, multiprocessing=View(torch.multiprocessing, spawn=spawn_and_pass_on))  # type: ignore


def _is_ours(cfg: Any = None) -> bool:
    """Whether a fairseq config has our user dir."""
    user_dir = getattr(getattr(cfg, "common", None), "user_dir", None)
    if not isinstance(user_dir, str):
        return False
    return user_dir == os.environ.get(USER_DIR) or os.path.basename(user_dir) == "skill_fairseq"


def restore_numpy_int(data_utils: ModuleType) -> None:
    """numpy >= 1.24, masking with ``no_mask_overlap``.

    "AttributeError: module 'numpy' has no attribute 'int'": fairseq's masking gets a numpy that has it.
    """
    data_utils.np = View(data_utils.np, int=int)  # type: ignore[attr-defined]


def take_any_path(hydra_train: ModuleType) -> None:
    """``fairseq-hydra-train task.data=/home/jürgen/data``, and other characters that hydra's grammar does not accept.

    "LexerNoViableAltException", "mismatched input '='", or for a comma "Ambiguous value": quotes overrides that hydra
    cannot read if the value is a path, and overrides with a backslash, which hydra would misread, if the path exists.
    """
    plain_main = hydra_train.cli_main

    def cli_main() -> None:
        multirun = not {"-m", "--multirun"}.isdisjoint(sys.argv)
        for place, word in enumerate(sys.argv):
            if place > 0 and sys.argv[place - 1] not in WITH_VALUE:
                sys.argv[place] = contained(quote_path, word, multirun) or word
        plain_main()

    hydra_train.cli_main = cli_main  # type: ignore[attr-defined]


WITH_VALUE = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--cfg", "-c", "--package", "-p")
"""Options of hydra that take an argument."""


def quote_path(word: str, multirun: bool) -> str:
    """An override that hydra 1.0 can read: ``field='value'`` if it cannot read ``field=value`` and the value is a path.

    Args:
        word: a word of the command line.
        multirun: whether a comma separates the values of a sweep.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import ValueType
    from hydra.errors import HydraException

    field, equals, value = word.partition("=")
    if word.startswith("-") or not equals or value[:1] in ("", "'", '"', "[", "{"):
        return word
    try:
        parsed = OverridesParser.create().parse_override(word)
        if parsed.is_sweep_override():
            keep = multirun or parsed.value_type != ValueType.SIMPLE_CHOICE_SWEEP or "/" not in value
        else:
            misread = parsed.value() != value and (os.path.exists(value) or value.endswith(" "))
            keep = "/" not in value or not misread
    except HydraException:
        keep = "/" not in value and not os.path.exists(value)
    if keep:
        return word
    quoted = value.replace("'", "\\'")
    return f"{field}='{quoted}'"


BEFORE = (allow_dataclass_defaults, restore_find_module, restore_typing_io, name_user_dir, requeue_from_start_up)
AFTER = {
    "hydra._internal.utils": (print_exceptions,),
    "fairseq.checkpoint_utils": (load_checkpoints,),
    "fairseq.distributed.utils": (load_from_other_ranks, pass_signals_on),
    "fairseq_cli.hydra_train": (take_any_path,),
    "fairseq.data.data_utils": (restore_numpy_int,),
}
