"""What a message must say, without its prose."""

from __future__ import annotations

import re


def says(*parts: object) -> str:
    """A pattern for ``pytest.raises(match=...)`` and :func:`re.search`: every part stands in the text.

    Args:
        parts: field, value, words of the remedy; in any order, each whole: 16 is neither in "160" nor in "1.6".
    """
    texts = [str(part) for part in parts]
    assert texts and all(texts), "nothing to look for"
    return "(?s)^" + "".join(f"(?=.*{_whole(text)})" for text in texts)


def _whole(text: str) -> str:
    """A word does not go on by a letter or digit, nor after a dot or dash; a number begins there as well."""
    before = r"(?<!\w)(?<!\w[.-])" if text[0].isdigit() else r"(?<!\w)" if re.match(r"\w", text) else ""
    after = r"(?!\w|[.-]\w)" if re.search(r"\w$", text) else ""
    return before + re.escape(text) + after
