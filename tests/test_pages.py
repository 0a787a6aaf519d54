"""Every page's links work, and its commands and their options exist."""

from __future__ import annotations

import contextlib
import doctest
import functools
import importlib
import io
import re
import shlex
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    path
    for path in sorted(ROOT.rglob("*.md"))
    if not {"out", ".venv", ".matrix", "outputs"} & set(path.relative_to(ROOT).parts)
]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


def prose(text: str) -> str:
    """A page without code blocks."""
    return re.sub(r"(?ms)^```.*?^```$", "", text)


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"(?m)^#+ +(.*)$", prose(text))
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


def commands(text: str) -> list[str]:
    """Lines of shell blocks, with continued lines joined, without comments and prompts."""
    found = []
    for block in re.findall(r"(?ms)^```bash\n(.*?)^```$", text):
        joined = re.sub(r"\s*\\\n\s*", " ", block)
        found += [line.strip() for line in joined.splitlines() if line.strip() and not line.strip().startswith("#")]
    return found


@cache
def options(module: str) -> set[str]:
    """The options that one of our commands, or a subcommand, documents."""
    help_of = functools.partial(help_text, importlib.import_module(f"skill_fairseq.cli.{module}").main)
    text = help_of(["--help"])
    within = re.search(r"positional arguments:\s+\{(.*?)\}", text)
    text += "".join(help_of([name, "--help"]) for name in within.group(1).split(",")) if within else ""
    return set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", text))


def help_text(main: Callable[[list[str]], int], words: list[str]) -> str:
    """What a command prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        main(words)
    return said.getvalue()


WITH_EXAMPLES = [page for page in PAGES if ">>> " in page.read_text(encoding="utf-8")]


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: page.name)
def test_examples_give_what_they_say(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = re.sub(r"(?m)^```.*$", "", page.read_text(encoding="utf-8"))
    test = doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)
    said = io.StringIO()
    found = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=said.write)
    assert found.attempted and not found.failed, said.getvalue()


@pytest.mark.parametrize("name", ["modules.encoder"])
def test_examples_of_docstrings(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"skill_fairseq.{name}"))
    assert found.attempted and not found.failed


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target}: no such file"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_blocks_are_shell_that_bash_can_read(page: Path) -> None:
    for block in re.findall(r"(?ms)^```bash\n(.*?)^```$", page.read_text(encoding="utf-8")):
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_and_their_options_exist(page: Path) -> None:
    for line in commands(page.read_text(encoding="utf-8")):
        words = shlex.split(line, comments=True)
        program = next((word for word in words if "=" not in word or word.startswith("-")), "")
        if program.startswith("skill-"):
            known = options(program.removeprefix("skill-"))
            given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
            assert given <= known, f"{line}: {sorted(given - known)}"
        elif program == "fairseq-hydra-train" and "--config-dir" in words:
            folder, name = words[words.index("--config-dir") + 1], words[words.index("--config-name") + 1]
            if folder.startswith("config/"):
                assert (ROOT / folder / f"{name}.yaml").is_file(), line
        elif program in ("bash", "python") and len(words) > 1 and "/" in words[1] and "$" not in words[1]:
            assert (ROOT / words[1]).is_file(), line
