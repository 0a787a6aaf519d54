"""Reading torch files: harmless classes become placeholders, all others are refused by name."""

from __future__ import annotations

import argparse
import os
import pathlib
import pickle
import struct
import tracemalloc
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from messages import says

from skill_fairseq.checkpoints.safe_load import load_torch_file, plain
from skill_fairseq.checkpoints.unpickling import Placeholder, read


class RunsCode:
    """A pickle that would create a folder when read."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_tensors_and_harmless_objects(protocol, zipped, tmp_path):
    from fairseq.data import Dictionary
    from omegaconf import OmegaConf

    weights = [torch.randn(3, 2).to(t) for t in (torch.float32, torch.float16, torch.bfloat16, torch.float64)]
    state = OrderedDict((str(i), weight) for i, weight in enumerate(weights))
    state["whole"] = torch.arange(3, dtype=torch.int64)
    state["parameter"] = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    cfg = {"model": {"_name": "hubert", "layers": [1, 2.5, None, True], "rate": 0.1}}
    checkpoint = {
        "args": argparse.Namespace(arch="hubert", normalize=True),
        "cfg": OmegaConf.create(cfg),
        "model": state,
        "dictionaries": [Dictionary()],
        "numbers": [np.float64(1.5), np.float32(1.5), np.int64(2), np.bool_(True)],
        "mixed": (1, "a", {2, 3}, torch.float16, torch.device("cpu"), torch.Size([1, 2])),
    }
    torch.save(checkpoint, tmp_path / "a.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    found = load_torch_file(tmp_path / "a.pt")
    assert list(found["model"]) == list(state)
    assert all(torch.equal(found["model"][name], tensor) for name, tensor in state.items())
    assert all(found["model"][name].dtype == tensor.dtype for name, tensor in state.items())
    assert plain(found["args"]) == {"arch": "hubert", "normalize": True}
    assert plain(found["cfg"]) == plain(checkpoint["cfg"]) == cfg
    assert plain(checkpoint["args"]) == plain(found["args"])
    assert found["mixed"] == checkpoint["mixed"]
    assert found["numbers"] == checkpoint["numbers"] and found["numbers"][1].dtype == np.float32
    for stranger in (found["args"], found["cfg"], found["dictionaries"][0]):
        assert isinstance(stranger, Placeholder)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_not_run(zipped, tmp_path):
    checkpoint = {"model": {}, "extra": RunsCode(tmp_path / "made")}
    torch.save(checkpoint, tmp_path / "bad.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"class posix\.mkdir"):
        load_torch_file(tmp_path / "bad.pt")
    assert not (tmp_path / "made").exists()
    load_torch_file(tmp_path / "bad.pt", trust=True)
    assert (tmp_path / "made").exists()  # it would have been


def legacy(pickled: bytes) -> bytes:
    """A file of torch before 1.6 whose object is this pickle."""
    parts = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    return b"".join(pickle.dumps(part, 2) for part in parts) + pickled + pickle.dumps([], 2)


STORAGE = b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"

HOSTILE = {
    "attributes of a class": b"\x80\x02cargparse\nNamespace\n}X\x04\x00\x00\x00evilK\x01s\x86b.",
    "attributes of a function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.",
    "a class that may only be named": b"\x80\x02cbuiltins\nlist\n]\x85R.",
    "a number type is called": b"\x80\x02ctorch\nfloat32\nK\x01\x85R.",
    "memory for an index": b"\x80\x02Nr\xff\xff\xff\x7f0N.",  # fine: no memory is allocated for it
    "a hash as deep as the file": b"\x80\x02}N" + b"\x85" * 200_000 + b"Ns.",
    "a text longer than the file": b"\x80\x04\x8d" + (1 << 40).to_bytes(8, "little") + b"x.",
    "a bytearray longer than the file": b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b"x.",
    "a storage longer than the file": STORAGE + b"\x8a\x06\x00\x00\x00\x00\x00\x01NtQ.",
    "copies of copies": b"\x80\x02]q\x00(%be0cbuiltins\nset\nq\x010%bN." % (b"N" * 100_000, b"h\x01h\x00\x85R0" * 100),
    "sparse tensors": b"\x80\x02ctorch._utils\n_rebuild_sparse_tensor\n.",
    "memory by tensor": b"\x80\x02ctorch\nTensor\nJ\x00\x00\x00\x7f\x85R.",
    "memory by storage": b"\x80\x02ctorch\nFloatStorage\nJ\x00\x00\x00\x7f\x85R.",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_no_pickle_changes_the_program_or_takes_memory_that_the_file_does_not_have(what, tmp_path, monkeypatch):
    monkeypatch.setattr("skill_fairseq.checkpoints.unpickling.MAX_PICKLE", 500_000)  # the sooner it is enough
    (tmp_path / "legacy.pt").write_bytes(legacy(HOSTILE[what]))
    if what == "memory for an index":
        assert load_torch_file(tmp_path / "legacy.pt") is None
        return
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="legacy.pt: "):
            load_torch_file(tmp_path / "legacy.pt")
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()
    assert not hasattr(argparse.Namespace, "evil") and not hasattr(torch._utils._rebuild_tensor_v2, "a")


def rewritten(path, change):
    """A copy of a torch file with members changed by a function; stored, with correct checksums."""
    with zipfile.ZipFile(path) as old:
        members = change({name: old.read(name) for name in old.namelist()})
    with zipfile.ZipFile(path, "w") as new:
        for name, content in members.items():
            new.writestr(name, content)


def test_a_storage_is_as_long_as_the_pickle_says_and_a_tensor_no_longer_than_its_storage(tmp_path):
    path = tmp_path / "a.pt"
    for tensor, said in ((torch.ones(3), "storage 0"), (torch.ones(1).expand(1000), "storage")):
        torch.save({"model": {"a": tensor}}, path)
        if len(tensor) == 3:
            rewritten(path, lambda m: {name: b"1234" if "data/0" in name else text for name, text in m.items()})
        with pytest.raises(ValueError, match=said):
            load_torch_file(path)


def test_views_transpositions_and_empty_tensors_come_back(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    saved = {"whole": base, "view": base[1:3, 2:], "turned": base.t(), "none": torch.empty(0, 3), "one": base[2, 3]}
    for zipped in (True, False):
        torch.save(saved, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        found = load_torch_file(tmp_path / "a.pt")
        assert all(torch.equal(found[name], tensor) for name, tensor in saved.items())
        found["whole"].zero_()
        assert not found["view"].any() and not found["turned"].any()  # they still share their numbers


def test_every_flipped_bit_of_a_tensor_is_noticed(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"model": {"weight": torch.arange(64.0)}}, path)
    whole = path.read_bytes()
    start = whole.index(torch.arange(64.0).numpy().tobytes())
    for place in range(start, start + 256, 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"a.pt: .*CRC"):
            load_torch_file(path)


def test_compressed_members_and_members_over_each_other_are_refused(tmp_path):
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(50_000_000))
    with pytest.raises(ValueError, match=r"a.pt: .*compressed"):
        load_torch_file(path)
    torch.save({"model": {"a": torch.ones(5000)}}, path)
    content = path.read_bytes()
    at = content.index(b"PK\x01\x02")  # the directory
    end = content.rindex(b"PK\x05\x06")
    total, length = struct.unpack("<HI", content[end + 10 : end + 16])
    directory = content[at : at + length]
    twice = content[:at] + directory * 2 + content[end:]
    place = len(content[:at]) + 2 * length
    fixed = bytearray(twice[: place + 22])
    struct.pack_into("<HHI", fixed, place + 8, 2 * total, 2 * total, 2 * length)
    path.write_bytes(fixed)
    assert len(zipfile.ZipFile(path).namelist()) == 2 * total
    with pytest.raises(ValueError, match=r"a.pt: .*overlap"):
        load_torch_file(path)


@pytest.mark.parametrize("deep", [True, False])
def test_configurations_that_grow_when_they_are_walked_are_refused(deep, tmp_path):
    value = ["x"]
    for _ in range(100 if deep else 30):
        value = [value] if deep else [value] * 10
    torch.save({"model": {"a": torch.ones(1)}, "cfg": {"model": value}}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=says("larger than", "deeper than")):
        plain(load_torch_file(tmp_path / "a.pt")["cfg"])


def test_real_classes_are_made_where_they_are_asked_for(tmp_path):
    from fairseq.data import Dictionary
    from omegaconf import DictConfig, OmegaConf

    words = Dictionary()
    words.add_symbol("hello")
    saved = {"args": argparse.Namespace(a=1), "cfg": OmegaConf.create({"a": [1, "x"], "b": "${a}"}), "words": words}
    for protocol in (2, 4):
        torch.save(saved, tmp_path / "a.pt", pickle_protocol=protocol)
        with open(tmp_path / "a.pt", "rb") as file:
            found = read(file, real_classes=True)
        assert found["args"] == saved["args"] and found["words"].index("hello") == words.index("hello")
        assert isinstance(found["cfg"], DictConfig) and found["cfg"] == saved["cfg"] and found["cfg"].b == [1, "x"]


def test_unknown_classes_are_refused_by_name_and_read_when_trusted(tmp_path):
    path = tmp_path / "odd.pt"
    torch.save({"model": {"a": torch.ones(1)}, "where": pathlib.PurePosixPath("x/y")}, path)
    with pytest.raises(ValueError, match=r"odd.pt: .*class pathlib\.(_local\.)?PurePosixPath.*skill-export --trust"):
        load_torch_file(path)
    assert load_torch_file(path, trust=True)["where"] == pathlib.PurePosixPath("x/y")


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_files_say_so_wherever_they_end(zipped, tmp_path):
    path = tmp_path / "whole.pt"
    checkpoint = {"cfg": {}, "model": {"weight": torch.randn(200)}}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for size in range(3, len(whole), max(1, len(whole) // 40)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"whole.pt: .*truncated"):
            load_torch_file(path)


def test_other_zip_archives_and_torchscript_are_named(tmp_path):
    np.savez(tmp_path / "arrays.npz", a=np.ones(2))
    with pytest.raises(ValueError, match=says("zip archive", "a.npy")):
        load_torch_file(tmp_path / "arrays.npz")
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "script.pt")
    with pytest.raises(ValueError, match="TorchScript"):
        load_torch_file(tmp_path / "script.pt")


def test_a_plain_pickle_is_no_checkpoint(tmp_path):
    (tmp_path / "list.pkl").write_bytes(pickle.dumps([1, 2, 3], 2))
    with pytest.raises(ValueError, match=says("list.pkl", "truncated", "torch checkpoint")):
        load_torch_file(tmp_path / "list.pkl")
