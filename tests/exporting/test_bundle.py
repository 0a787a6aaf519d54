"""The bundled code is the package's own, flat and complete."""

from __future__ import annotations

import ast
import sys
import textwrap

import pytest
from messages import says

from skill_fairseq.exporting.bundle import bundle
from skill_fairseq.exporting.folder import atomic_folder


@pytest.mark.parametrize("root", ["skill_fairseq.exporting.modeling_skill", "skill_fairseq.exporting.s3prl_expert"])
def test_imports_stay_in_the_folder(root):
    files = bundle(root)
    assert f"{root.rpartition('.')[2]}.py" in files and {"encoder.py", "config.py", "attention.py"} <= set(files)
    foreign = set()
    for text in files.values():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                if node.level:
                    assert node.level == 1 and f"{node.module}.py" in files
                else:
                    foreign.add(node.module.partition(".")[0])
            elif isinstance(node, ast.Import):
                foreign.update(alias.name.partition(".")[0] for alias in node.names)
        assert text.startswith("# skill_fairseq.") and "MIT License" in text.splitlines()[1]
    standard = set(sys.stdlib_module_names)
    foreign -= {"scipy"}  # inside a try: only audio at another rate needs it
    assert {"torch", "numpy"} <= foreign and foreign - standard <= {"torch", "numpy", "transformers", "safetensors"}


def test_code_is_the_packages_own(tmp_path):
    from skill_fairseq.modules import hard_concrete

    text = bundle("skill_fairseq.modules.hard_concrete")["hard_concrete.py"]
    assert text.split("\n", 2)[2] == open(hard_concrete.__file__, encoding="utf-8").read()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("import skill_fairseq.files as files", ["line 1", "from skill_fairseq.files.MODULE import NAME"]),
        ("from skill_fairseq.modules import config", ["line 1", "from skill_fairseq.modules.MODULE import NAME"]),
        (
            "from skill_fairseq.cli.export import main\nfrom skill_fairseq.checkpoints.export import DTYPES",
            ["skill_fairseq.cli.export", "skill_fairseq.checkpoints.export", "export.py"],
        ),
    ],
)
def test_what_cannot_be_flattened_is_refused(line, said, tmp_path, monkeypatch):
    (tmp_path / "odd_module.py").write_text(textwrap.dedent(line))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=says(*said)):
        bundle("odd_module")


def test_folders_are_whole_or_absent(tmp_path):
    with atomic_folder(tmp_path / "new" / "a") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "new" / "a").exists()
    assert [entry.name for entry in (tmp_path / "new").rglob("*")] == ["a", "file"]
    with (
        pytest.raises(FileExistsError, match=says(tmp_path / "new" / "a", "exists")),
        atomic_folder(tmp_path / "new" / "a"),
    ):
        pass
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "b") as folder:
        (folder / "file").write_text("x")
        raise KeyboardInterrupt
    assert [entry.name for entry in tmp_path.iterdir()] == ["new"]
    (tmp_path / "empty").mkdir()
    with atomic_folder(tmp_path / "empty") as folder:
        (folder / "file").write_text("x")
    assert (tmp_path / "empty" / "file").read_text() == "x"
