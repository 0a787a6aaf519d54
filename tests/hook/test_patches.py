"""Each patch of the start-up hook: the error without it, on affected versions, and no error with it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy
import pytest
import torch


def version(package) -> tuple[int, int]:
    major, minor = package.__version__.split(".")[:2]
    return int(major), int(minor)


DATACLASS_DEFAULT = """
import omegaconf
from dataclasses import dataclass

@dataclass
class Inner:
    value: int = 3

@dataclass
class Outer:
    __module__ = {module!r}
    inner: Inner = Inner()

print(Outer().inner.value)
"""


@pytest.mark.parametrize(
    ("module", "hook", "refused"),
    [("fairseq.made_up", True, False), ("fairseq.made_up", False, True), ("elsewhere", True, True)],
)
def test_dataclass_default_is_allowed_in_the_patched_packages_only(python, module, hook, refused):
    result = python(DATACLASS_DEFAULT.format(module=module), hook)
    if refused and sys.version_info >= (3, 11):
        assert "ValueError: mutable default" in result.stderr
    else:
        assert result.stdout == "3\n", result.stderr


@pytest.mark.parametrize("hook", [True, False])
def test_hydra_finds_its_plugins(python, hook):
    result = python(
        "from hydra.core.plugins import Plugins\n"
        "from hydra.plugins.launcher import Launcher\n"
        "print([launcher.__name__ for launcher in Plugins.instance().discover(Launcher)])\n",
        hook,
    )
    if hook or sys.version_info < (3, 11):
        assert "BasicLauncher" in result.stdout, result.stderr
    else:
        assert result.returncode == 1


def test_find_module_is_what_find_spec_loads(python):
    result = python(
        "import omegaconf, json\n"
        "from importlib.machinery import FileFinder, SourceFileLoader\n"
        "finder = FileFinder(json.__path__[0], (SourceFileLoader, ['.py']))\n"
        "print(finder.find_module('decoder').path == json.decoder.__file__, finder.find_module('absent'))\n"
    )
    assert result.stdout == "True None\n", result.stderr


@pytest.mark.parametrize("hook", [True, False])
def test_typing_io_can_be_imported_by_antlr4(python, hook):
    result = python("import antlr4\nimport typing\nprint(sys.modules['antlr4.Lexer'].TextIO is typing.TextIO)\n", hook)
    if not hook and sys.version_info >= (3, 13):
        assert "No module named 'typing.io'" in result.stderr
    else:
        assert result.stdout == "True\n", result.stderr


def test_crash_under_hydra_shows_its_own_error_from_the_failing_line(python):
    result = python("import hydra\n@hydra.main()\ndef app(config):\n    raise ValueError('the real error')\napp()\n")
    assert result.returncode == 1
    assert "ValueError: the real error" in result.stderr
    assert "in app\n    raise ValueError('the real error')" in result.stderr
    assert "TypeError" not in result.stderr
    assert "run_and_report" not in result.stderr  # hydra's own frames are still left out


def test_fairseq_loads_and_masks_while_others_see_plain_torch_and_numpy(python):
    """Rows of torch.load and numpy.int together: importing fairseq takes long."""
    result = python(
        """
import io
import numpy as np
import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.data.data_utils import compute_mask_indices
from fairseq.distributed import utils as distributed_utils
from omegaconf import OmegaConf

state = {
    "args": None,
    "cfg": OmegaConf.create({"task": {"data": "here"}}),
    "dictionary": Dictionary(),
    "extra_state": {"train_iterator": {"epoch": 2}},
    "optimizer_history": [{"optimizer_name": "a", "lr_scheduler_state": {}, "num_updates": 7}],
}
torch.save(state, "checkpoint.pt")

def error(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as e:
        return type(e).__name__
    return None

print("checkpoint", len(checkpoint_utils.load_checkpoint_to_cpu("checkpoint.pt")["dictionary"]))
print("broadcast", len(distributed_utils.torch.load("checkpoint.pt")["dictionary"]))
print("torch.load", error(torch.load, "checkpoint.pt"))
print("weights_only", error(checkpoint_utils.torch.load, "checkpoint.pt", weights_only=True))
mask = compute_mask_indices((4, 100), None, 0.4, 10, no_overlap=True, min_space=1)
print("masked", mask.shape, mask.any(1).all())
print("np.int", error(lambda: np.int))
"""
    )
    assert result.returncode == 0, result.stderr
    seen = dict(line.split(" ", 1) for line in result.stdout.splitlines())
    assert seen["checkpoint"] == seen["broadcast"] == "4"  # Dictionary's special symbols
    assert seen["masked"] == "(4, 100) True"
    assert seen["torch.load"] == ("UnpicklingError" if version(torch) >= (2, 6) else "None")
    assert seen["weights_only"] == ("UnpicklingError" if version(torch) >= (1, 13) else "TypeError")
    assert seen["np.int"] == ("AttributeError" if version(numpy) >= (1, 24) else "None")


STRANGER = """
import os
import torch
from fairseq import checkpoint_utils
from fairseq.distributed import utils as distributed_utils

class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("made",)

torch.save({"args": None, "model": {}, "extra_state": RunsCode()}, "stranger.pt", _use_new_zipfile_serialization=ZIPPED)
try:
    checkpoint_utils.load_checkpoint_to_cpu("stranger.pt")
except ValueError as error:
    print(error)
print("made", os.path.exists("made"), "skill_fairseq" in sys.modules)
os.environ["SKILL_FAIRSEQ_TRUST"] = "1"
checkpoint_utils.torch.load(open("stranger.pt", "rb"))
print("trusted", os.path.exists("made"))
"""


@pytest.mark.parametrize("zipped", [True, False])
def test_fairseq_runs_no_code_of_a_checkpoint_unless_it_is_trusted(python, zipped):
    result = python(STRANGER.replace("ZIPPED", str(zipped)))
    assert result.returncode == 0, result.stderr
    refused, made, trusted = result.stdout.splitlines()
    assert "stranger.pt: " in refused and "posix.mkdir" in refused and "SKILL_FAIRSEQ_TRUST=1" in refused
    assert made == "made False False"  # and fairseq's other programs do not load this package
    assert trusted == "trusted True"


def test_without_the_hook_fairseq_fails_from_python_3_11(python):
    result = python("import fairseq", hook=False)
    assert (result.returncode != 0) == (sys.version_info >= (3, 11)), result.stderr


SPAWN = """
import os, signal, time
from argparse import Namespace

def rank(index, main, cfg, code):
    received = []
    signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    open(f"ready{index}", "w").close()
    while not received:
        time.sleep(0.01)
    open(f"received{index}", "w").close()
    while not all(os.path.exists(f"received{i}") for i in (0, 1)):  # the ranks' barrier
        time.sleep(0.01)
    sys.exit(code)

if __name__ == "__main__":
    import threading
    from fairseq.distributed import utils

    def ask():
        while not all(os.path.exists(f"ready{i}") for i in (0, 1)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=ask).start()
    signal.signal(signal.SIGUSR1, lambda number, frame: print("requeued after", sorted(os.listdir())))
    common = Namespace(user_dir="/somewhere/skill_fairseq")
    utils.torch.multiprocessing.spawn(rank, args=(None, Namespace(common=common), CODE), nprocs=2, join=True)
"""


@pytest.mark.parametrize("code", [75, 3])
def test_signals_reach_spawned_ranks_and_their_exit_code_comes_back(python, code):
    result = python(SPAWN.replace("CODE", str(code)))
    assert result.returncode == (75 if code == 75 else 1), result.stderr
    if code == 75:
        assert result.stdout == "requeued after ['ready0', 'ready1', 'received0', 'received1', 'script.py']\n"
    else:
        assert result.stdout == "" and "terminated with exit code 3" in result.stderr


START_UP = """
import os, signal, sys
sys.argv = {argv!r}
import omegaconf
os.kill(os.getpid(), signal.{name})
print("lives")
"""
CONFIG = Path(__file__).resolve().parents[2] / "config"
OURS = ["--config-dir", str(CONFIG / "distill"), "--config-name", "tiny"]


@pytest.mark.parametrize(
    ("program", "arguments", "environment", "name", "code"),
    [
        ("fairseq-hydra-train", OURS, {}, "SIGTERM", 75),
        ("fairseq-hydra-train", [f"--config-dir={CONFIG}/final", "--config-name=tiny.yaml"], {}, "SIGUSR2", 75),
        ("fairseq-train", ["--user-dir", "/somewhere/skill_fairseq"], {}, "SIGUSR1", 75),
        ("fairseq-hydra-train", OURS, {"WORLD_SIZE": "2"}, "SIGUSR1", 75),
        ("fairseq-hydra-train", OURS, {"SLURM_NTASKS": "2"}, "SIGTERM", -15),  # another task may have failed
        ("fairseq-hydra-train", [*OURS, "-m"], {}, "SIGTERM", -15),  # waits for runs, is none
        ("fairseq-hydra-train", ["--config-dir", "elsewhere", "--config-name", "tiny"], {}, "SIGTERM", -15),
        ("fairseq-train", ["/data", "--arch", "transformer"], {}, "SIGUSR1", -10),
        ("something", OURS, {}, "SIGTERM", -15),
    ],
)
def test_a_signal_while_one_of_our_trainings_starts_up(
    python, monkeypatch, tmp_path, program, arguments, environment, name, code
):
    for variable in ("WORLD_SIZE", "SLURM_NTASKS"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("SKILL_PREEMPTED_FILE", str(tmp_path / "preempted"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "tiny.yaml").write_text("task: {_name: translation}\n")
    result = python(START_UP.format(argv=[f"/bin/{program}", *arguments], name=name))
    assert (result.returncode, result.stdout) == (code, "")
    assert (tmp_path / "preempted").exists() == (code == 75)


def test_other_handlers_stay(python):
    """submitit's, which requeues the job."""
    code = "import signal\nsignal.signal(signal.SIGUSR2, lambda *_: print('own'))\n"
    result = python(code + START_UP.format(argv=["fairseq-hydra-train", *OURS], name="SIGUSR2"))
    assert result.stdout == "own\nlives\n", result.stderr


def test_other_runs_of_fairseq_spawn_as_without_the_hook(python):
    """Any exit code of a rank is an error, and signals are not handled."""
    result = python(
        """
from argparse import Namespace

def rank(index, *args):
    sys.exit(75)

if __name__ == "__main__":
    import signal
    from fairseq.distributed import utils
    taken, signal.signal = [], lambda *args: taken.append(args)
    other, none = Namespace(user_dir="/examples/wav2vec"), Namespace(user_dir=None)
    for cfg in (Namespace(common=other), Namespace(common=none), 3):
        try:
            utils.torch.multiprocessing.spawn(rank, args=(None, cfg, {}), nprocs=1, join=True)
        except utils.torch.multiprocessing.ProcessExitedException as error:
            print(error.exit_code, taken)
"""
    )
    assert result.stdout == "75 []\n" * 3, result.stderr


def test_amp_of_other_runs_is_fairseqs_own(python):
    code = "from fairseq.optim.amp_optimizer import AMPOptimizer as A\nprint(A.optimizer.fget.__code__.co_filename)\n"
    result = python(code)
    assert result.stdout.endswith("amp_optimizer.py\n"), result.stderr
