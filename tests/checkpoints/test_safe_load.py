"""Reading torch files: harmless classes as placeholders, everything else refused by name."""

from __future__ import annotations

import argparse
import os
import pathlib
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch

from skill_fairseq.checkpoints.safe_load import (
    Placeholder,
    load_restricted,
    load_torch_file,
    load_weights_only,
    plain,
)

# The restricted unpickler serves old versions of torch; it must read and refuse the same.
READERS = [load_restricted] + ([load_weights_only] if hasattr(torch.serialization, "safe_globals") else [])


class RunsCode:
    """A pickle that would make a folder when it is read."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("reader", READERS)
def test_tensors_and_harmless_objects(reader, zipped, tmp_path):
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
    torch.save(checkpoint, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    found = reader(tmp_path / "a.pt")
    assert list(found["model"]) == list(state)
    assert all(torch.equal(found["model"][name], tensor) for name, tensor in state.items())
    assert all(found["model"][name].dtype == tensor.dtype for name, tensor in state.items())
    assert plain(found["args"]) == {"arch": "hubert", "normalize": True}
    assert plain(found["cfg"]) == plain(checkpoint["cfg"]) == cfg
    assert plain(checkpoint["args"]) == plain(found["args"])
    assert found["mixed"] == checkpoint["mixed"]
    for stranger in (found["args"], found["cfg"], found["dictionaries"][0], *found["numbers"]):
        assert isinstance(stranger, Placeholder)


@pytest.mark.parametrize("reader", [*READERS, load_torch_file])
def test_code_is_not_run(reader, tmp_path):
    torch.save({"model": {}, "extra": RunsCode(tmp_path / "made")}, tmp_path / "bad.pt")
    with pytest.raises((pickle.UnpicklingError, ValueError), match="GLOBAL|of class"):
        reader(tmp_path / "bad.pt")
    assert not (tmp_path / "made").exists()
    load_torch_file(tmp_path / "bad.pt", trust=True)
    assert (tmp_path / "made").exists()  # it would have been


def test_attributes_of_classes_and_functions_cannot_be_set(tmp_path):
    """The restricted unpickler lets no pickle patch what it may name."""
    for name in ("torch\nTensor", "torch._utils\n_rebuild_tensor_v2"):
        patch = b"\x80\x02c" + name.encode() + b"\nN}X\x04\x00\x00\x00evilK\x01s\x86b."
        (tmp_path / "legacy.pt").write_bytes(patch)
        with pytest.raises(pickle.UnpicklingError, match="sets attributes"):
            load_restricted(tmp_path / "legacy.pt")
        assert not hasattr(torch.Tensor, "evil") and not hasattr(torch._utils._rebuild_tensor_v2, "evil")


def test_unknown_classes_are_refused_by_name_and_read_when_trusted(tmp_path):
    path = tmp_path / "odd.pt"
    torch.save({"model": {"a": torch.ones(1)}, "where": pathlib.PurePosixPath("x/y")}, path)
    with pytest.raises(ValueError, match=r"odd.pt: .*class pathlib\.(_local\.)?PurePosixPath.*trust=True .*--trust"):
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
    with pytest.raises(ValueError, match="zip archive of .*a.npy"):
        load_torch_file(tmp_path / "arrays.npz")
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "script.pt")
    with pytest.raises(ValueError, match="TorchScript"):
        load_torch_file(tmp_path / "script.pt")


def test_a_plain_pickle_is_no_checkpoint(tmp_path):
    (tmp_path / "list.pkl").write_bytes(pickle.dumps([1, 2, 3], 2))
    with pytest.raises(ValueError, match="list.pkl: is truncated, damaged or no torch checkpoint"):
        load_torch_file(tmp_path / "list.pkl")
