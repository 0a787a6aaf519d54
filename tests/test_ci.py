""".ci/run's output if a part cannot run, and tests/learned.py on an example's results."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from skill_fairseq.checkpoints import save_encoder

REPO = Path(__file__).resolve().parents[1]
BROWSER, SLURM = "a browser (no Chromium, and not root or no apt-get)", "Slurm (not root, or neither it nor apt-get)"
PYTHONS = "Python 3.10 (not found); Python 3.12 (not found)"


def write_script(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([f"#!{shutil.which('bash')}", *lines]) + "\n")
    path.chmod(0o755)


@pytest.fixture
def ci(tmp_path: Path) -> Any:
    """.ci/run in a tree with empty scripts as parts, on a machine with only the given programs."""

    def run(
        *programs: str, slurm: int = 0, matrix: int = 0, user: int = 1000, **env: str
    ) -> subprocess.CompletedProcess[str]:
        tree, bin = tmp_path / "tree", tmp_path / "bin"
        (tree / ".ci").mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO / ".ci" / "run", tree / ".ci" / "run")
        for part in ("tests/run.sh", "examples/tiny/run.sh", "examples/tiny/out/venv/bin/python"):
            write_script(tree / part, 'echo "ran $0 $*"')
        write_script(tree / "tests" / "slurm" / "run.sh", f"exit {slurm}")
        write_script(tree / "tests" / "matrix.sh", f"exit {matrix}")
        write_script(bin / "id", f"echo {user}")
        for name in ("bash", "dirname", "mktemp", "rm", "tail"):
            if not (bin / name).exists():
                (bin / name).symlink_to(str(shutil.which(name)))
        for program in programs:
            name, _, code = program.partition("=")
            write_script(bin / name, f"exit {code or 0}")
        command = [str(shutil.which("bash")), str(tree / ".ci" / "run")]
        return subprocess.run(command, env={"PATH": str(bin), **env}, capture_output=True, text=True)

    return run


@pytest.mark.parametrize("env", [{}, {"CI": "1"}, {"CI": "true"}])
def test_the_last_line_says_that_all_was_run(ci: Any, env: dict[str, str]) -> None:
    done = ci("chromium", **env)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "all parts were run"
    assert "tests/learned.py examples/tiny/out" in done.stdout


@pytest.mark.parametrize("env", [{}, {"CI": "1"}, {"CI": "true"}])
def test_what_the_machine_cannot_have_is_named_and_is_no_failure(ci: Any, env: dict[str, str]) -> None:
    done = ci(slurm=77, matrix=77, user=0, **env)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == f"not run on this machine: {BROWSER}; {PYTHONS}; {SLURM}"


@pytest.mark.parametrize(("value", "code"), [("1", 1), ("true", 1), ("", 0), ("0", 0)])
def test_what_it_could_have_run_fails_under_ci(ci: Any, value: str, code: int) -> None:
    """Root with an apt-get that has no browser."""
    done = ci("apt-get=1", user=0, CI=value)
    assert done.returncode == code
    if code:
        assert BROWSER in done.stderr and f"CI={value}" in done.stderr
    else:
        assert done.stdout.splitlines()[-1] == f"not run on this machine: {BROWSER}"


@pytest.mark.parametrize("status", [1, 2, 130])
def test_a_part_that_fails_ends_it(ci: Any, status: int) -> None:
    done = ci("chromium", slurm=status)
    assert done.returncode == status and "examples/tiny" not in done.stdout


def load_learned() -> Any:
    spec = importlib.util.spec_from_file_location("learned", REPO / "tests" / "learned.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({}, None),
        ({"expected": 0.739}, "expected by the gates 0.7390"),
        ({"actual": 0.761}, "of the shrunk student 0.7610"),
        ({"loss": -0.2}, "distillation loss: -0.2000"),
        ({"loss": float("nan")}, "distillation loss: nan"),
        ({"student": 90}, "starts at 0.251"),
    ],
)
def test_each_thing_that_a_student_has_not_learned_is_found(
    changes: dict[str, Any], failed: str | None, tmp_path: Path, small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"expected": 0.745, "actual": 0.751, "loss": -0.9, "student": 250, **changes}
    learned = load_learned()
    monkeypatch.setattr(learned, "random_students_loss", lambda out: -0.2)
    for stage, line in {
        "stage1": f"[t][train_inner][INFO] - epoch 001: expected_sparsity={found['expected']}, num_updates=400",
        "stage2": f"[t][valid][INFO] - epoch 001 | distillation_loss {found['loss']} | num_updates 200",
    }.items():
        (tmp_path / stage / ".hydra").mkdir(parents=True)
        (tmp_path / stage / ".hydra" / "config.yaml").write_text("criterion: {target_sparsity: 0.75}\n")
        (tmp_path / stage / "hydra_train.log").write_text(line + "\n")
    save_encoder(small.random_encoder(), tmp_path / "shrunk.safetensors", {"sparsity": {"actual": found["actual"]}})
    entries = [
        {"model": name, "task": "digit", "correct": correct, "total": 300}
        for name, correct in {"student": found["student"], "random": 66}.items()
    ]
    (tmp_path / "probe.json").write_text(json.dumps({"results": entries}))
    lines = learned.failures(tmp_path)
    assert len(lines) == (failed is not None) and all(str(failed) in line for line in lines)


def test_random_weights_are_farther_from_the_teacher_than_a_student(tmp_path: Path) -> None:
    """The example's own teacher as its student, which nothing can be closer to."""
    learned = load_learned()
    tiny = REPO / "examples" / "tiny"
    teacher = tiny / "teacher" / "teacher.safetensors"
    shutil.copy(teacher, tmp_path / "student.safetensors")
    (tmp_path / "clusters").mkdir()
    (tmp_path / "clusters" / "groups.yaml").write_text("groups: [[0], [1, 2], [12]]\n")
    config = {
        "task": {"teacher": str(teacher), "data": str(tiny / "data")},
        "criterion": {"projection_sharing": "all", "normalize_states": True},
    }
    (tmp_path / "stage2" / ".hydra").mkdir(parents=True)
    (tmp_path / "stage2" / ".hydra" / "config.yaml").write_text(json.dumps(config))
    width = learned.load_encoder(teacher).config.encoder_embed_dim
    identity = {"weight": learned.torch.eye(width), "bias": learned.torch.zeros(width)}
    state = {f"projections.projections.0.{name}": value for name, value in identity.items()}
    learned.torch.save({"criterion": state}, tmp_path / "stage2" / "checkpoint_last.pt")
    assert -0.8 < learned.random_students_loss(tmp_path) < 1.5
