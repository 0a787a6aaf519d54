"""What users are told: names that no terminal takes for commands, shell lines, and which errors are theirs to mend."""

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
"""The extra of setup.py that brings a module."""

# C0 and C1, separators of lines, marks that turn the direction of writing, and bytes that are not UTF-8
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_NO_MEMORY = ("out of memory", "can't allocate memory", "Cannot allocate memory", "_STATUS_ALLOC_FAILED")


def printable(text: object, keep: str = "") -> str:
    """Text in one line for a terminal: control characters and bytes that are not UTF-8 become escapes like \\x1b.

    Args:
        text: what ``str`` makes a text of.
        keep: control characters to leave as they are.
    """
    return _CONTROLS.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), str(text))


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte that it cannot decode
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def shell_quote(word: str | os.PathLike[str]) -> str:
    """A word as bash reads it back, whatever is in it; in bash's ``$'...'`` if it holds control characters."""
    text = os.fspath(word)
    if not _CONTROLS.search(text):
        return shlex.quote(text)
    plain = {byte: chr(byte) for byte in range(0x20, 0x7F) if chr(byte) not in "\\'"}
    return "$'" + "".join(plain.get(byte, f"\\x{byte:02x}") for byte in os.fsencode(text)) + "'"


def remedy_for(module: str) -> str:
    """How to get a module that is not installed."""
    extra = f"[{EXTRAS[module]}]" if module in EXTRAS else ""
    return f"pip install '.{extra}' in a clone of skill_fairseq"


def require(field: str, *modules: str) -> None:
    """Makes sure, before any work, that modules are installed.

    Raises:
        ValueError: one is not; names ``field``, which needs it, and the remedy.
    """
    for module in modules:
        try:
            found = find_spec(module) is not None
        except ValueError:  # sys.modules holds something without a spec
            found = sys.modules[module] is not None
        if not found:
            raise ValueError(f"{field}: {module} is not installed; run {remedy_for(module)}")


def require_linux(what: str) -> None:
    """Makes sure that this is Linux.

    Raises:
        OSError: it is not.
    """
    if not sys.platform.startswith("linux"):
        raise OSError(
            f"{what}: this system is {sys.platform!r}, expected 'linux', whose file locks and /proc are used; "
            "skill_fairseq.load_encoder works elsewhere too"
        )


def out_of_memory(error: BaseException) -> bool:
    """Whether memory, of the machine or of a GPU, did not suffice."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError):
        return True
    kind = getattr(torch.cuda, "OutOfMemoryError", None)  # since torch 1.13
    if kind is not None and isinstance(error, kind):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_MEMORY)


def not_utf8(error: BaseException) -> bool:
    """Whether a library could not take the name of a file or folder, which is not UTF-8."""
    return isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed"


def meant_for_users(error: BaseException, program: str = "skill_fairseq") -> bool:
    """Whether an error is the user's to mend: the system's refusals, a package that is missing, memory that does not
    suffice, a name that is not UTF-8, and each ValueError that a ``raise`` of this package or of `program` made; where
    that is ``__main__``, of the files beside it too. A ValueError that Python or a library raised comes from a defect
    of ours.
    """
    if isinstance(error, ImportError):
        return (error.name or "skill_fairseq").partition(".")[0] not in ("skill_fairseq", program)
    if isinstance(error, OSError) or out_of_memory(error) or not_utf8(error):
        return True
    return isinstance(error, ValueError) and _raised_by(error.__traceback__, program)


def _raised_by(traceback: TracebackType | None, program: str) -> bool:
    if traceback is None:
        return True  # it comes from another process, which has decided
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    frame = traceback.tb_frame
    ours = str(frame.f_globals.get("__name__")).partition(".")[0] in ("skill_fairseq", program)
    if program == "__main__" and not ours:
        script = getattr(sys.modules[program], "__file__", None) or ""
        ours = os.path.dirname(os.path.abspath(script)) == os.path.dirname(os.path.abspath(frame.f_code.co_filename))
    return ours and dis.opname[frame.f_code.co_code[traceback.tb_lasti]] == "RAISE_VARARGS"
