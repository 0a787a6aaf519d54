"""Versions recorded with results."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest

from skill_fairseq.versions import versions


def test_what_is_recorded_is_what_is_installed_and_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package whose name differs from its module's, and one that shadows another of the same name."""
    for folder, number in (("first", "9.8.7"), ("second", "1.2.3")):
        (tmp_path / folder / "made_up-1.dist-info").mkdir(parents=True)
        text = f"Metadata-Version: 2.1\nName: made-up\nVersion: {number}\n"
        (tmp_path / folder / "made_up-1.dist-info" / "METADATA").write_text(text)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "first"), str(tmp_path / "second"), *sys.path])
    found = versions("made-up", "scikit-learn")
    assert found.pop("made-up") == "9.8.7" and sys.version.startswith(found.pop("python"))
    # A wheel's metadata may omit torch's build: 1.12.1 for 1.12.1+cu102.
    found["torch"] = found["torch"].split("+")[0]
    installed = {name: metadata.version(name) for name in ("skill_fairseq", "torch", "numpy", "scikit-learn")}
    assert found == {**installed, "torch": installed["torch"].split("+")[0]}


def test_a_package_that_is_not_there_is_named() -> None:
    with pytest.raises(metadata.PackageNotFoundError, match="no-such-package"):
        versions("no-such-package")
