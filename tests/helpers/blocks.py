"""Code blocks of the pages: their marks, and a folder in which they run as written.

A comment in the line before a block defines its test; without one the block is run. Parts are separated by ``;``:

    <!-- needs: network, corpus -->            parsed only: it needs something that a test machine may lack, see NEEDS
    <!-- covered by: tests/test_x.py::test_y --> run by that test, or by a script such as .ci/run
    <!-- nightly -->                           takes long: run by the nightly tests
    <!-- given: model -->                      Python that uses the reader's names, see GIVEN
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_models import huggingface

ROOT = Path(__file__).resolve().parents[2]
NEEDS = {"cluster", "coremltools", "corpus", "gpu", "hours", "memory", "network"}
"""What a block may need that a test machine lacks; memory: more than 4 GB."""
SHORT = (
    *("common.cpu=true", "distributed_training.distributed_world_size=1", "dataset.num_workers=0"),
    *("dataset.max_tokens=48000", "task.max_sample_size=48000", "optimization.max_update=2"),
)
"""Added to every fairseq-hydra-train of a page: one process on a CPU, two updates of 3 s."""
TEACHER = ROOT / "examples" / "tiny" / "teacher" / "teacher.safetensors"


class Block(NamedTuple):
    """One fenced block.

    Attributes:
        page: path of the page.
        line: where the code begins, counted from 1.
        language: the word after the fence.
        code: its lines.
        marks: name of each mark -> the text after its colon, split at commas.
    """

    page: Path
    line: int
    language: str
    code: str
    marks: dict[str, list[str]]

    @property
    def is_run(self) -> bool:
        """Whether the page's own test runs it."""
        runs = self.language == "bash" or (self.language == "python" and ">>> " not in self.code)
        return runs and not {"needs", "covered by"} & set(self.marks)

    @property
    def place(self) -> str:
        """Page and line, for messages."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"(?ms)^(?:<!-- ([^\n]*?) -->\n)?```(\w+)\n(.*?)^```$", text):
        comment, language, code = found.groups()
        parts = (part.partition(":") for part in (comment or "").split(";") if part.strip())
        marks = {name.strip(): [w.strip() for w in words.split(",") if w.strip()] for name, _, words in parts}
        yield Block(page, text.count("\n", 0, found.start(3)) + 1, language, code, marks)


def _batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(2, 8000), torch.tensor([0, 1])) for _ in range(2)]


def _loss(model: Any) -> torch.Tensor:
    ((waves, labels), *_) = _batches()
    return model(waves, labels=labels).loss


GIVEN: dict[str, Callable[[], Any]] = {
    "model": lambda: huggingface("wavlm", "base", "ForSequenceClassification", num_labels=2),
    "your_loss": lambda: _loss,
    "update": lambda: 0,
    "batches": _batches,
}
"""Names that Python blocks take for granted, and how they are made."""


def stand_ins(folder: Path) -> None:
    """What the pages assume in the folder where their commands are typed: the clone's folders, LibriSpeech with
    transcripts, models under the names that the pages use."""
    for name in ("config", "examples"):
        (folder / name).symlink_to(ROOT / name)
    speech = sorted((ROOT / "examples" / "tiny" / "data" / "audio" / "librispeech").rglob("*.flac"))
    for number, file in enumerate(speech):
        part = ("train-clean-100", "train-clean-360", "train-other-500")[number % 3]
        name = file.stem.removeprefix("ls-")
        chapter = folder.joinpath("LibriSpeech", part, *name.split("-")[:2])
        chapter.mkdir(parents=True, exist_ok=True)
        (chapter / f"{name}.flac").symlink_to(file)
        with open(chapter / f"{'-'.join(name.split('-')[:2])}.trans.txt", "a", encoding="utf-8") as stream:
            stream.write(f"{name} {'THE QUICK BROWN FOX JUMPS OVER A LAZY DOG'[number:]}\n")
    for name in ("WavLM-Base+.pt", "hubert_base_ls960.pt", "first.safetensors", "second.safetensors"):
        shutil.copy(TEACHER, folder / name)  # files are recognised by content
    huggingface("wavlm", "base").save_pretrained(folder / "microsoft" / "wavlm-base-plus")
    program = folder / "bin" / "fairseq-hydra-train"
    program.parent.mkdir()
    ours = Path(sys.executable).with_name("fairseq-hydra-train")
    program.write_text(f'#!/bin/sh\nexec "{ours}" "$@" {" ".join(SHORT)}\n', encoding="utf-8")
    program.chmod(0o755)


def run_blocks(page: list[Block], folder: Path) -> None:
    """Runs blocks in order, like a reader in this folder; Python blocks share their names.

    Raises:
        AssertionError: a block fails; gives its place and output.
    """
    names: dict[str, Any] = {}
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env["SKILL_FAIRSEQ_USER_DIR"] = str(ROOT / "skill_fairseq")
    for block in page:
        if block.language == "bash":
            command = ["bash", "-euo", "pipefail", "-c", block.code]
            out = subprocess.PIPE
            done = subprocess.run(command, cwd=folder, env=env, stdout=out, stderr=subprocess.STDOUT, text=True)
            assert done.returncode == 0, f"{block.place}: {done.stdout[-5000:]}"
            continue
        names.update({name: GIVEN[name]() for name in block.marks.get("given", ()) if name not in names})
        try:
            exec(compile("\n" * (block.line - 1) + block.code, str(block.page), "exec"), names)
        except Exception as error:
            raise AssertionError(f"{block.place}: {type(error).__name__}: {error}") from error
