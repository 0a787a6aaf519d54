"""Every block of code in a page is run as written, in a folder that has what the page assumes, or is marked:
see ``helpers/blocks.py``."""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path

import pytest
import yaml
from blocks import GIVEN, NEEDS, ROOT, Block, blocks, run_blocks, stand_ins

README = ROOT / "README.md"
PAGES = [
    path
    for path in sorted(ROOT.rglob("*.md"))
    if not {"out", ".venv", "venv", ".matrix", "outputs"} & set(path.relative_to(ROOT).parts)
]
ALL = [block for page in PAGES for block in blocks(page)]
RUN = {page: [block for block in blocks(page) if block.is_run] for page in PAGES}
QUICK = [page for page in PAGES if page != README and any("nightly" not in block.marks for block in RUN[page])]
LONG = [page for page in PAGES if any("nightly" in block.marks for block in RUN[page])]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def readme(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with stand-ins in which the README's commands have run, because the other pages assume their files."""
    folder = tmp_path_factory.mktemp("readme")
    stand_ins(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_blocks([block for block in RUN[README] if "nightly" not in block.marks], folder)
    return folder


@pytest.fixture
def workplace(readme: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, entered."""
    folder = tmp_path / "copy"
    shutil.copytree(readme, folder, symlinks=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.slow
def test_readme(readme: Path) -> None:
    """Checks that the results of its commands exist."""
    import skill_fairseq

    teacher = skill_fairseq.load_encoder(readme / "WavLM-Base+.pt")
    student = skill_fairseq.load_encoder(readme / "student.safetensors")
    assert student.num_parameters() == pytest.approx(teacher.num_parameters() / 4, rel=0.01)
    assert len(list((readme / "features").rglob("*.npy"))) > 0 and (readme / "hf_student" / "config.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("page", QUICK, ids=name)
def test_quick_blocks_run(page: Path, workplace: Path) -> None:
    run_blocks([block for block in RUN[page] if "nightly" not in block.marks], workplace)


@pytest.mark.nightly
@pytest.mark.parametrize("page", LONG, ids=name)
def test_long_blocks_run(page: Path, workplace: Path) -> None:
    run_blocks([block for block in RUN[page] if "nightly" in block.marks], workplace)


@pytest.mark.parametrize("block", ALL, ids=lambda block: f"{name(block.page)}-{block.line}")
def test_blocks_can_be_read_and_marks_are_known(block: Block) -> None:
    assert set(block.marks) <= {"needs", "covered by", "nightly", "given"}, block.place
    assert block.language in {"bash", "python", "yaml", "mermaid"}, block.place
    assert set(block.marks.get("needs", ())) <= NEEDS, block.place
    assert set(block.marks.get("given", ())) <= set(GIVEN), block.place
    if block.language == "python" and ">>> " not in block.code:
        ast.parse(block.code)
    elif block.language == "yaml":
        assert isinstance(yaml.safe_load(block.code), dict)
    elif block.language == "bash":
        words = re.sub(r"#.*", "", block.code)
        assert "..." not in words and not re.search(r" \[[-A-Z]", words), f"{block.place}: holds a placeholder"


COVERED = [(block, place) for block in ALL for place in block.marks.get("covered by", ())]


@pytest.mark.parametrize("block, place", COVERED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_covers_a_block_is_there(block: Block, place: str) -> None:
    """A test of that name; of another script, one that calls the block's scripts, or is one of them."""
    file, _, test = place.partition("::")
    text = (ROOT / file).read_text(encoding="utf-8")
    if file.endswith(".py"):
        assert re.search(rf"(?m)^def {test or 'test_'}", text), f"{block.place}: {place} is not there"
    else:
        scripts = re.findall(r"(?m)^(?:bash|python) (\S+)", block.code)
        assert scripts and all(script == file or script in text for script in scripts), block.place


def test_most_blocks_are_run_or_covered() -> None:
    """Marks are only for blocks that cannot be run: a page in which all are marked would not be tested."""
    shell = [block for block in ALL if block.language == "bash"]
    assert sum("needs" not in block.marks for block in shell) > 2 * sum("needs" in block.marks for block in shell)
