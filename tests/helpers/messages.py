"""Checks the essential parts of a message, not its wording."""

from __future__ import annotations

import re


def says(*parts: object) -> str:
    """A pattern for ``pytest.raises(match=...)`` and :func:`re.search` that requires every part.

    Args:
        parts: field, value, words of the remedy; in any order, each as a whole word: 16 matches neither "160" nor
            "1.6".
    """
    texts = [str(part) for part in parts]
    assert texts and all(texts), "nothing to look for"
    return "(?s)^" + "".join(f"(?=.*{_whole(text)})" for text in texts)


def _whole(text: str) -> str:
    """A part as a whole word: no letter or digit follows, also after a dot or dash; numbers also need a boundary
    before."""
    before = r"(?<!\w)(?<!\w[.-])" if text[0].isdigit() else r"(?<!\w)" if re.match(r"\w", text) else ""
    after = r"(?!\w|[.-]\w)" if re.search(r"\w$", text) else ""
    return before + re.escape(text) + after
