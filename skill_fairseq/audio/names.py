"""Names of files and folders that a manifest can hold."""

from __future__ import annotations

from skill_fairseq.reading import PathLike


def unstorable(name: str) -> str:
    """Why a manifest cannot hold this path; empty if it can."""
    if not name:
        return "is empty"
    if "\t" in name or len(name.splitlines()) > 1 or name.splitlines() != [name]:
        return "has a tab or line break"
    if name[0].isspace():
        return "begins with a blank"
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return "is not UTF-8"
    return ""


def check_root(root: PathLike) -> None:
    """Checks that a manifest's first line can hold a folder's name.

    Raises:
        ValueError: it cannot.
    """
    text = str(root)
    reason = unstorable(text) or ("ends with a blank" if text[-1].isspace() else "")
    if reason:
        raise ValueError(f"{text!r} {reason}, which a manifest's root cannot; rename the folder")
