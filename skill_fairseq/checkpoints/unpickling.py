"""Reads files of ``torch.save`` without running their code, in memory and time bounded by the file's size.

It does not use ``torch.load``, whose safe mode reads only pickle protocol 2, and both of whose modes trust the file's
claims (a storage's length, deflated members, references to references). Here a class is read only if its name is known
to be harmless, every checksum is verified, and no more is allocated than the file holds.

The start-up hook runs this file standalone, so that fairseq reads checkpoints through it too; it imports nothing from
the package.
"""

from __future__ import annotations

import codecs
import importlib
import io
import os
import pickle
import re
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

HARMLESS = (
    "argparse.Namespace",
    "fairseq.data.dictionary.Dictionary",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "Boolean", "Float", "Integer", "String")),
    "typing.Any",
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "str", "tuple")),
)
"""Classes in configurations and vocabularies."""

MAX_PICKLE = 4_000_000
"""Maximum bytes of a file's pickle; an object takes up to a hundred times its pickle's bytes."""

MAX_REAL_PICKLE = 250_000_000
"""The same limit with ``real_classes``: programs may have large vocabularies."""

_CHUNK = 1 << 24
_STORAGES = {
    **{f"{kind}Storage": getattr(torch, kind.lower()) for kind in ("Double", "Float", "Half", "Long", "Int", "Short")},
    **{"CharStorage": torch.int8, "ByteStorage": torch.uint8, "UntypedStorage": torch.uint8},
    **{"BoolStorage": torch.bool, "BFloat16Storage": torch.bfloat16},
    **{"ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128},
}
_LEGACY = (0x1950A86A20F9469CFC6C, 1001)
"""Beginning of files of torch before 1.6: a magic number, and the format's version."""


class Refused(pickle.UnpicklingError):
    """The file holds an object of a class not known to be harmless.

    Attributes:
        name: the class.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"holds an object of class {name}, which could run code")
        self.name = name


class Placeholder:
    """Replaces an object of a harmless class: keeps its attributes and runs none of its code."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Placeholder:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


def _placeholder(path: str) -> type:
    module, _, name = path.rpartition(".")
    return type(name, (Placeholder,), {"__module__": module})


PLACEHOLDERS = {path: _placeholder(path) for path in HARMLESS}


def real_class(path: str) -> Any:
    """The harmless class itself, for programs that need more than its attributes."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def read(file: BinaryIO, real_classes: bool = False, tensors: bool = True) -> Any:
    """Reads an open file of ``torch.save`` onto the CPU.

    Args:
        file: at its beginning; in torch's zip format, or that of torch before 1.6.
        real_classes: create real objects of harmless classes instead of :class:`Placeholder`.
        tensors: read their numbers; otherwise tensors of the zip format are on torch's device "meta".

    Raises:
        Refused: it holds an object of another class.
        Exception: almost any, if the file is damaged or has another format.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    zipped = file.read(2) == b"PK"
    file.seek(0)
    return _read_zip(file, size, real_classes, tensors) if zipped else _read_legacy(file, size, real_classes)


def _open_archive(file: Any) -> zipfile.ZipFile:
    """Opens a zip file whose content is no larger than the file.

    Raises:
        zipfile.BadZipFile: it is damaged, compressed, or names the same bytes or the same member twice.
    """
    archive = zipfile.ZipFile(file)
    members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise zipfile.BadZipFile("its members are compressed, which torch.save never does")
    size = archive.fp.seek(0, os.SEEK_END)  # type: ignore[union-attr]
    if len({member.filename for member in members}) < len(members) or sum(m.file_size for m in members) > size:
        raise zipfile.BadZipFile("its members overlap")
    return archive


def _read_pickle(archive: zipfile.ZipFile, most: int) -> tuple[bytes, str]:
    """The pickle in a torch archive, and the name of its folder, with a slash.

    Raises:
        zipfile.BadZipFile, ValueError: it is missing, damaged or too long.
    """
    names = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
    if len(names) != 1:
        raise ValueError(f"it has {len(names)} members data.pkl; expected one")
    length = archive.getinfo(names[0]).file_size
    if length > most:
        raise ValueError(f"its pickle has {length:,} bytes; expected at most {most:,}")
    return archive.read(names[0]), names[0][: -len("data.pkl")]


def _most(real_classes: bool) -> int:
    return MAX_REAL_PICKLE if real_classes else MAX_PICKLE


def _read_zip(file: BinaryIO, size: int, real_classes: bool, tensors: bool) -> Any:
    with _open_archive(file) as archive:
        text, folder = _read_pickle(archive, _most(real_classes))
        order = folder + "byteorder"
        if order in archive.namelist() and archive.read(order).decode() != sys.byteorder:
            raise ValueError("its numbers have the byte order of another kind of processor")

        def fill(buffer: bytearray, key: str) -> None:
            if archive.getinfo(f"{folder}data/{key}").file_size != len(buffer):
                raise ValueError(f"its storage {key} is not as long as its pickle says")
            with archive.open(f"{folder}data/{key}") as member:  # verifies the checksum at the end
                _fill(buffer, member)
                member.read(1)

        return Unpickler(Whole(text, len(text)), real_classes, Storages(size, fill, tensors)).load()


def _read_legacy(file: BinaryIO, size: int, real_classes: bool) -> Any:
    """The format of torch before 1.6: pickles, then every storage after its length."""
    text = Whole(file, _most(real_classes))
    storages = Storages(size)
    start = tuple(Unpickler(text, real_classes, storages).load() for _ in _LEGACY)
    if start != _LEGACY:
        raise ValueError("it does not begin like a torch file")
    _, found, keys = (Unpickler(text, real_classes, storages).load() for _ in range(3))
    if sorted(keys) != sorted(storages.buffers):
        raise ValueError("its storages are not those that its pickle names")
    for key in keys:
        buffer, dtype = storages.buffers[key], storages.made[key].dtype
        (length,) = struct.unpack("<q", Whole(file, 8).read(8))
        if length * _width(dtype) != len(buffer):
            raise ValueError(f"its storage {key} is not as long as its pickle says")
        _fill(buffer, file)
    return found


def _fill(buffer: bytearray, file: Any) -> None:
    view, done = memoryview(buffer), 0
    while done < len(buffer):
        read = file.readinto(view[done : done + _CHUNK])
        if not read:
            raise EOFError("it ends in the middle of a tensor: it is truncated")
        done += read


def _width(dtype: torch.dtype) -> int:
    return torch.empty(0, dtype=dtype).element_size()


class Storages:
    """Storages of the tensors; allocates no more memory than the file can hold.

    Args:
        size: bytes of the file.
        fill: reads the storage of a key into a buffer; None: the caller does.
        real: False: allocate nothing, tensors are on the device "meta".
    """

    def __init__(self, size: int, fill: Callable[[bytearray, str], None] | None = None, real: bool = True) -> None:
        self.left = size
        self.fill = fill
        self.real = real
        self.buffers: dict[str, bytearray] = {}
        self.made: dict[str, Tensor] = {}

    def get(self, kind: Any, key: Any, count: Any) -> Tensor:
        """The (count,) tensor of a storage, the same one for the same key."""
        if not (isinstance(key, str) and type(count) is int and count >= 0 and isinstance(kind, torch.dtype)):
            raise pickle.UnpicklingError("a storage is described wrongly")
        if key not in self.made:
            length = count * _width(kind)
            self.left -= length
            if self.left < 0:
                raise ValueError("its tensors are larger than the file: it is truncated")
            if self.real:
                self.made[key] = self._read(kind, key, length)
            else:
                self.made[key] = torch.empty(count, dtype=kind, device="meta")
        found = self.made[key]
        if found.dtype != kind or len(found) != count:
            raise pickle.UnpicklingError(f"the storage {key} is described in two ways")
        return found

    def _read(self, kind: torch.dtype, key: str, length: int) -> Tensor:
        buffer = self.buffers[key] = bytearray(length)
        if self.fill is not None:
            self.fill(buffer, key)
        return torch.frombuffer(buffer, dtype=kind) if length else torch.empty(0, dtype=kind)


class Whole:
    """Reads exactly the requested bytes or raises, because pickle accepts truncated reads."""

    def __init__(self, source: Any, most: int) -> None:
        self.source = io.BytesIO(source) if isinstance(source, bytes) else source
        self.most = self.left = most

    def read(self, length: int) -> bytes:
        self._count(length)
        return self._checked(self.source.read(length), length)

    def readline(self) -> bytes:
        line: bytes = self.source.readline(self.left)
        self._count(len(line))
        return self._checked(line, len(line) + (not line.endswith(b"\n")))

    def _count(self, length: int) -> None:
        self.left -= length
        if self.left < 0:
            raise ValueError(f"its pickle is cut short or has more than {self.most:,} bytes: it may be truncated")

    @staticmethod
    def _checked(data: bytes, length: int) -> bytes:
        if len(data) < length:
            raise EOFError("its pickle is truncated")
        return data


_Python: Any = pickle._Unpickler  # written in Python, so its steps can be replaced


def _checking_keys(step: Callable[[Any], None], keys: slice) -> Callable[[Any], None]:
    """Wraps a step of the unpickler to check the keys on its stack first."""

    def checked(unpickler: Unpickler) -> None:
        unpickler.check_keys(unpickler.stack[keys])
        step(unpickler)

    return checked


def _checking_class(step: Callable[[Any], None], place: int) -> Callable[[Any], None]:
    """Wraps a step that creates an object to check its class, at a position of the stack, first."""

    def checked(unpickler: Unpickler) -> None:
        if not unpickler.known(unpickler.stack[place]):
            raise pickle.UnpicklingError("makes an object of an unknown kind")
        step(unpickler)

    return checked


class Unpickler(_Python):
    """Creates containers, strings, numbers, tensors, and objects of :data:`HARMLESS` classes.

    Keys are strings and numbers, so that no hash walks a container. The pickle's length limits how often containers are
    copied. Reads protocols 2 to 5, without bytearrays.

    Args:
        file: the pickle.
        real_classes: see :func:`read`.
        storages: storages of the tensors.
    """

    def __init__(self, file: Whole, real_classes: bool, storages: Storages) -> None:
        super().__init__(file, encoding="utf-8")
        self.copies_left = max(MAX_PICKLE, file.most)
        self.storages = storages
        self.find = real_class if real_classes else PLACEHOLDERS.__getitem__
        self.functions: dict[str, Any] = {
            "builtins.set": self._set,
            "builtins.frozenset": lambda items=(): frozenset(self._set(items)),
            "collections.OrderedDict": self._ordered,
            "collections.defaultdict": lambda *default: {},
            "torch.Size": lambda items: torch.Size(self.copied(items)[:64]),
            "torch.device": torch.device,
            "torch._utils._rebuild_tensor": _tensor,
            "torch._utils._rebuild_tensor_v2": _tensor,
            "torch._utils._rebuild_parameter": _parameter,
            "torch.nn.parameter.Parameter": _parameter,
            "numpy.dtype": _number_type,
            "numpy.core.multiarray.scalar": _number,
            "numpy._core.multiarray.scalar": _number,
            "_codecs.encode": _latin,
        }
        self.classes: set[type] = {OrderedDict}

    def copied(self, items: Iterable[Any] = ()) -> list[Any]:
        """The items as a list, within a limit over the whole file."""
        found = list(items) if hasattr(items, "__len__") else []
        self.copies_left -= 50 + len(found)
        if self.copies_left < 0:
            raise pickle.UnpicklingError("containers are copied too often")
        return found

    def check_keys(self, keys: Iterable[Any]) -> None:
        """Raises UnpicklingError if a key is not a string, a number, or a short tuple of these."""
        for key in keys:
            for part in key if type(key) is tuple and len(key) < 10 else (key,):
                if part is not None and not isinstance(part, (str, bytes, int, float, torch.dtype)):
                    raise pickle.UnpicklingError(f"a {type(part).__name__} serves as a key")

    def known(self, kind: Any) -> bool:
        """Whether objects of this class may be created, and their attributes set."""
        return isinstance(kind, type) and (kind in self.classes or issubclass(kind, np.dtype))

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}".replace("__builtin__.long", "builtins.int")
        path = path.replace("__builtin__.", "builtins.")  # Python 2 names, used by pickle protocol 2
        if path in self.functions:
            return self.functions[path]
        if path in PLACEHOLDERS:
            found = self.find(path)
            if isinstance(found, type) and found.__module__ != "builtins":
                self.classes.add(found)
            return found
        storage = re.fullmatch(r"torch\.(?:storage\.)?(\w+)", path)
        if storage and storage[1] in _STORAGES:
            return _STORAGES[storage[1]]
        if storage and isinstance(getattr(torch, storage[1], None), torch.dtype):
            return getattr(torch, storage[1])
        raise Refused(path)

    def persistent_load(self, pid: Any) -> Tensor:
        """A storage, from (kind, type, key, device, count); the old format adds a view of it."""
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] not in ("storage", b"storage"):
            raise pickle.UnpicklingError("a storage is described wrongly")
        found = self.storages.get(pid[1], pid[2], pid[4])
        if len(pid) == 6 and pid[5] is not None:
            _, offset, count = pid[5]
            return _tensor(found, offset, (count,), (1,))
        return found

    def load_reduce(self) -> None:
        function = self.stack[-2]
        if not self.known(function) and not any(function is known for known in self.functions.values()):
            raise pickle.UnpicklingError(f"calls a {type(function).__name__}")
        super().load_reduce()

    def load_build(self) -> None:
        """Sets an object's state; setting that of a class or function would change the running program."""
        state, made = self.stack.pop(), self.stack[-1]
        if not self.known(type(made)) or not isinstance(state, (dict, tuple)):
            raise pickle.UnpicklingError(f"sets attributes of a {type(made).__name__}")
        if isinstance(made, np.dtype):
            return  # complete already
        if not isinstance(state, dict):
            raise pickle.UnpicklingError(f"sets a {type(made).__name__} to a {type(state).__name__}")
        self.copied(state)
        made.__dict__.update(state)

    def load_empty_set(self) -> None:
        self.copied()  # counts it: an empty set takes 200 times its byte
        super().load_empty_set()

    def load_frozenset(self) -> None:
        self.check_keys(self.copied(self.stack))
        super().load_frozenset()

    def _set(self, items: Any = ()) -> set[Any]:
        found = self.copied(items)
        self.check_keys(found)
        return set(found)

    def _ordered(self, items: Any = ()) -> OrderedDict[Any, Any]:
        pairs = self.copied(items)
        self.check_keys(key for key, _ in pairs)
        return OrderedDict(pairs)

    dispatch = {
        **_Python.dispatch,
        pickle.SETITEM[0]: _checking_keys(_Python.load_setitem, slice(-2, -1)),
        pickle.SETITEMS[0]: _checking_keys(_Python.load_setitems, slice(None, None, 2)),
        pickle.DICT[0]: _checking_keys(_Python.load_dict, slice(None, None, 2)),
        pickle.ADDITEMS[0]: _checking_keys(_Python.load_additems, slice(None)),
        pickle.EMPTY_SET[0]: load_empty_set,
        pickle.FROZENSET[0]: load_frozenset,
        pickle.REDUCE[0]: load_reduce,
        pickle.BUILD[0]: load_build,
        pickle.NEWOBJ[0]: _checking_class(_Python.load_newobj, -2),
        pickle.NEWOBJ_EX[0]: _checking_class(_Python.load_newobj_ex, -3),
    }
    for refused in (pickle.BYTEARRAY8, pickle.INST, pickle.OBJ):
        del dispatch[refused[0]]


def _tensor(storage: Tensor, offset: int, size: Any, stride: Any, requires_grad: bool = False, *hooks: Any) -> Tensor:
    """The view of a storage that a pickle describes; no number may repeat."""
    last = sum((n - 1) * step for n, step in zip(size, stride)) if min(size, default=1) > 0 else -1
    count = int(np.prod([int(n) for n in size], dtype=object)) if size else 1
    if len(size) != len(stride) or min((offset, *size, *stride)) < 0 or len(size) > 8:
        raise pickle.UnpicklingError("a tensor is described wrongly")
    if offset + last >= len(storage) or count > len(storage):
        raise pickle.UnpicklingError(f"a tensor of shape {tuple(size)} is larger than its storage of {len(storage)}")
    return torch.as_strided(storage, size, stride, offset).requires_grad_(requires_grad is True)


def _parameter(tensor: Tensor, requires_grad: bool = True, *hooks: Any) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=bool(requires_grad))


def _number_type(code: Any, *flags: Any) -> np.dtype[Any]:
    if not isinstance(code, str) or not re.fullmatch(r"[biufc]\d{1,2}", code):
        raise pickle.UnpicklingError(f"numbers of numpy's type {str(code)[:40]!r}")
    return np.dtype(code)


def _number(kind: Any, data: Any) -> Any:
    if not isinstance(kind, np.dtype) or not isinstance(data, bytes) or len(data) != kind.itemsize:
        raise pickle.UnpicklingError("a number is described wrongly")
    return np.frombuffer(data, kind)[0]


def _latin(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes in the encoding {str(encoding)[:40]!r}")
    return codecs.latin_1_encode(text)[0]
