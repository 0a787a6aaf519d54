"""Reading torch files of strangers without running any of their code.

Checkpoints of speech models hold, beside tensors, configurations and vocabularies as pickled objects. Their
classes are known by name and read as :class:`Placeholder`, which keeps what was stored and does nothing; so
neither fairseq nor omegaconf need be installed. Any other class is refused.
"""

from __future__ import annotations

import argparse
import enum
import inspect
import pickle
import re
import threading
import types
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

HARMLESS = (
    "argparse.Namespace",
    "fairseq.data.dictionary.Dictionary",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "Boolean", "Float", "Integer", "String")),
    "collections.defaultdict",
    "typing.Any",
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "str", "tuple")),
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "_codecs.encode",
)
"""What configurations, vocabularies and logged numbers are made of; read as :class:`Placeholder`."""

# What the tensors themselves are made of; torch versions spell storages differently.
_TENSORS = re.compile(
    r"builtins\.(set|frozenset)|collections\.OrderedDict"
    r"|torch\.(Size|device|dtype|Tensor|\w+Storage)|torch\.storage\.\w+Storage"
    r"|torch\.(float|double|half|bfloat|u?int|long|short|bool)\d*"
    r"|torch\.nn\.parameter\.Parameter|torch\._utils\._rebuild_(tensor|tensor_v2|parameter)"
)


class Placeholder:
    """Stands for an object of a harmless class: keeps its attributes and runs none of its code."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Placeholder:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def _placeholder(path: str) -> type:
    module, _, name = path.rpartition(".")
    return type(name, (Placeholder,), {"__module__": module})


_PLACEHOLDERS = {path: _placeholder(path) for path in HARMLESS}
_allowing = threading.Lock()  # what is allowed holds for the whole process: a thread that ends takes it from the others


_PythonUnpickler: Any = pickle._Unpickler  # written in Python: its single steps can be replaced


class _RestrictedUnpickler(_PythonUnpickler):
    """For torch versions whose ``weights_only`` cannot be told of further classes, or that have none."""

    def load_build(self) -> None:
        """Sets the state of an object; a state for a class or a function would change the running program."""
        if not isinstance(self.stack[-2], (Placeholder, OrderedDict, torch.Tensor)):
            raise pickle.UnpicklingError(f"sets attributes of {self.stack[-2]!r}")
        super().load_build()

    dispatch = {**_PythonUnpickler.dispatch, pickle.BUILD[0]: load_build}

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}".replace("__builtin__.long", "builtins.int")
        path = path.replace("__builtin__.", "builtins.")  # names of Python 2, which pickle protocol 2 uses
        if path in _PLACEHOLDERS:
            return _PLACEHOLDERS[path]
        if _TENSORS.fullmatch(path):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"GLOBAL {path} is not allowed")


def _restricted_pickle() -> types.ModuleType:
    """A stand-in for the module ``pickle``, as torch.load takes one."""
    module = types.ModuleType("restricted_pickle")
    module.Unpickler = _RestrictedUnpickler  # type: ignore
    module.load = lambda file, **options: _RestrictedUnpickler(file, **options).load()  # type: ignore
    return module


def load_weights_only(path: Path) -> Any:
    """torch.load with ``weights_only=True`` and the harmless classes allowed; needs torch >= 2.5."""
    with _allowing, torch.serialization.safe_globals(list(_PLACEHOLDERS.values())):
        return torch.load(path, map_location="cpu", weights_only=True)


def load_restricted(path: Path) -> Any:
    """The same through an unpickler of our own, for any torch."""
    return torch.load(path, map_location="cpu", pickle_module=_restricted_pickle(), **_everything())


def _everything() -> dict[str, bool]:
    """The argument that makes torch.load read any pickle; torch < 1.13 always does, and knows no argument."""
    return {"weights_only": False} if "weights_only" in inspect.signature(torch.load).parameters else {}


def load_torch_file(path: Path, trust: bool = False) -> Any:
    """Reads what ``torch.save`` wrote, onto the CPU.

    Args:
        path: the file.
        trust: read any pickled class, which runs code of whoever made the file.

    Returns:
        what was saved; objects of harmless classes as :class:`Placeholder` (see :func:`plain`).

    Raises:
        ValueError: the file is truncated, damaged or no torch file, or holds an object of an unknown class.
    """
    with open(path, "rb") as file:
        zipped = file.read(2) == b"PK"
    if zipped:
        _check_archive(path)
    try:
        if trust:
            return torch.load(path, map_location="cpu", **_everything())
        if hasattr(torch.serialization, "safe_globals"):
            return load_weights_only(path)
        return load_restricted(path)
    except Exception as error:  # damaged pickles raise nearly anything
        if trust and isinstance(error, (ImportError, AttributeError)):
            raise ValueError(f"{path}: a class in it cannot be imported ({error}); install it") from error
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused and not _ends_with(path, refused.group(1).rpartition(".")[2]):
            raise ValueError(
                f"{path}: holds an object of class {refused.group(1)}, which is not read from an untrusted "
                "file because it could run code; if you trust where the file comes from, allow it with "
                "trust=True (on the command line: --trust)"
            ) from error
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"{path}: is truncated, damaged or no torch checkpoint ({reason}); expected what torch.save "
            "writes: compare its size or checksum with the original and fetch it again"
        ) from error


def load_without_objects(path: Path) -> Any:
    """The dictionaries, lists, texts and numbers that ``torch.save`` wrote, whatever else there is.

    No tensor is read and no code of the file runs; tensors and objects are empty dictionaries.

    Args:
        path: a file in torch's zip format.

    Raises:
        Exception: nearly any, where the file is missing, damaged or of another format.
    """
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl")
        with archive.open(name) as file:
            return _WithoutObjects(file).load()


class _Omitted(dict):
    """Stands for an object, and is empty: takes every argument, item and state, and runs none of its code."""

    __hash__ = object.__hash__  # type: ignore[assignment]  # it may have been a key

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass


class _WithoutObjects(pickle.Unpickler):
    """Reads dictionaries, lists, texts and numbers; all else is omitted."""

    def find_class(self, module: str, name: str) -> Any:
        return OrderedDict if (module, name) == ("collections", "OrderedDict") else _Omitted

    def persistent_load(self, pid: Any) -> Any:
        """A tensor's storage."""
        return None


def _ends_with(path: Path, name: str) -> bool:
    """Whether a file ends with a name, or a byte after it: then the name itself was cut short."""
    return name.encode() in path.read_bytes()[-len(name) - 1 :]


def _check_archive(path: Path) -> None:
    """Raises ValueError unless a zip file is whole and looks like torch's."""
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path}: starts like a torch checkpoint but its end is missing: it is truncated at "
            f"{path.stat().st_size:,} bytes; fetch it again"
        )
    names = zipfile.ZipFile(path).namelist()
    members = {name.split("/", 1)[-1] for name in names}
    if "data.pkl" not in members or "constants.pkl" in members:
        kind = "a TorchScript program" if "constants.pkl" in members else f"a zip archive of {names[:3]}"
        raise ValueError(f"{path}: is {kind}; expected a checkpoint written by torch.save")


def plain(value: Any) -> Any:
    """Configurations of every kind as dictionaries, lists and plain values.

    Takes mappings, sequences, namespaces, omegaconf containers and the placeholders of these.
    """
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, argparse.Namespace):
        return plain(vars(value))
    if isinstance(value, Placeholder):
        fields = vars(value)
        for inner in ("_content", "_val"):  # omegaconf's containers and leaves
            if inner in fields:
                return plain(fields[inner])
        return plain(fields)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [plain(item) for item in value]
    return value
