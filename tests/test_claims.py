"""Every claim of ``claims.py`` is in its page, and its evidence exists."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("claims", Path(__file__).with_name("claims.py"))
assert _spec is not None and _spec.loader is not None
claims = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(claims)


@pytest.mark.parametrize("claim", claims.CLAIMS, ids=lambda claim: claim.words[:40])
def test_claims_have_evidence(claim: claims.Claim) -> None:  # type: ignore[name-defined]
    page = " ".join((ROOT / claim.page).read_text(encoding="utf-8").split())
    assert claim.words in page, f"{claim.page} no longer says so"
    if "::" not in claim.evidence:
        script = next((word for word in claim.evidence.split() if "/" in word), None)
        assert script is None or (ROOT / script).exists() or script == "examples/tiny/out"
        return
    file, _, test = claim.evidence.partition("::")
    source = (ROOT / file).read_text(encoding="utf-8")
    assert re.search(rf"^def {test or 'test_'}", source, re.M), f"{file} has no {test}"
