"""Messages for users: safe text for terminals, shell quoting, and which errors are theirs to fix."""

from __future__ import annotations

import dis
import errno
import os
import re
import shlex
import sys
from importlib.util import find_spec
from types import TracebackType

import torch

EXTRAS = {
    "matplotlib": "plots",
    "sklearn": "probe",
    "transformers": "hf",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "openvino": "openvino",
    "submitit": "slurm",
}
"""Module -> the extra of setup.py that installs it."""

# C0 and C1, line separators, marks of writing direction, and bytes that are not UTF-8
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_NO_MEMORY = ("out of memory", "can't allocate memory", "Cannot allocate memory", "_STATUS_ALLOC_FAILED")


def printable(text: object, keep: str = "") -> str:
    """Text for one line of a terminal: control characters and bytes that are not UTF-8 become escapes like \\x1b.

    Args:
        text: anything that ``str`` accepts.
        keep: control characters to leave as they are.
    """
    return _CONTROLS.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), str(text))


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # Python's stand-in for a byte that it cannot decode
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def shell_quote(word: str | os.PathLike[str]) -> str:
    """Quotes any word for bash, with ``$'...'`` if it holds control characters."""
    text = os.fspath(word)
    if not _CONTROLS.search(text):
        return shlex.quote(text)
    plain = {byte: chr(byte) for byte in range(0x20, 0x7F) if chr(byte) not in "\\'"}
    return "$'" + "".join(plain.get(byte, f"\\x{byte:02x}") for byte in os.fsencode(text)) + "'"


def remedy_for(module: str) -> str:
    """How to install a missing module."""
    extra = f"[{EXTRAS[module]}]" if module in EXTRAS else ""
    return f"pip install '.{extra}' in a clone of skill_fairseq"


def require(field: str, *modules: str) -> None:
    """Checks, before any work, that modules are installed.

    Raises:
        ValueError: one is not; names it, the ``field`` that needs it, and the remedy.
    """
    for module in modules:
        try:
            found = find_spec(module) is not None
        except ValueError:  # sys.modules holds something without a spec
            found = sys.modules[module] is not None
        if not found:
            raise ValueError(f"{field}: {module} is not installed; run {remedy_for(module)}")


def require_linux(what: str) -> None:
    """Checks that this is Linux.

    Raises:
        OSError: it is not.
    """
    if not sys.platform.startswith("linux"):
        raise OSError(
            f"{what}: this system is {sys.platform!r}, expected 'linux', whose file locks and /proc are used; "
            "skill_fairseq.load_encoder works elsewhere too"
        )


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the machine or a GPU ran out of memory."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError):
        return True
    kind = getattr(torch.cuda, "OutOfMemoryError", None)  # since torch 1.13
    if kind is not None and isinstance(error, kind):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_MEMORY)


def not_utf8(error: BaseException) -> bool:
    """Whether a library failed on the name of a file or folder because it is not UTF-8."""
    return isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed"


def meant_for_users(error: BaseException, program: str = "skill_fairseq") -> bool:
    """Whether an error is the user's to fix: errors of the operating system, a missing package, too little memory, a
    name that is not UTF-8, and a ValueError raised by this package or by `program` (for ``__main__``, also by the files
    beside it). A ValueError from Python or a library is a bug of ours.
    """
    if isinstance(error, ImportError):
        return (error.name or "skill_fairseq").partition(".")[0] not in ("skill_fairseq", program)
    if isinstance(error, OSError) or out_of_memory(error) or not_utf8(error):
        return True
    return isinstance(error, ValueError) and _raised_by(error.__traceback__, program)


def _raised_by(traceback: TracebackType | None, program: str) -> bool:
    if traceback is None:
        return True  # it comes from another process, which has decided already
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    frame = traceback.tb_frame
    ours = str(frame.f_globals.get("__name__")).partition(".")[0] in ("skill_fairseq", program)
    if program == "__main__" and not ours:
        script = getattr(sys.modules[program], "__file__", None) or ""
        ours = os.path.dirname(os.path.abspath(script)) == os.path.dirname(os.path.abspath(frame.f_code.co_filename))
    return ours and dis.opname[frame.f_code.co_code[traceback.tb_lasti]] == "RAISE_VARARGS"
