"""Truncated and bit-flipped files of every readable kind: a clean error or a complete result, within limits.

A kind is a function that writes intact files into a folder, and one that reads the folder like a user.
"""

from __future__ import annotations

import json
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from damaged import bounds, spoiled

from skill_fairseq.audio.manifest import read_manifest
from skill_fairseq.checkpoints import load_encoder, save_encoder
from skill_fairseq.clustering.config_file import merge_groups, read_config
from skill_fairseq.exporting.describe import as_rows, describe
from skill_fairseq.exporting.huggingface_folder import save_huggingface
from skill_fairseq.exporting.s3prl_folder import save_s3prl
from skill_fairseq.files import read_json, write_json
from skill_fairseq.objectives.groups import parse_groups, read_groups
from tests.conftest import random_encoder

CASES = 40
"""Of each kind: half are cut short, half have a bit flipped."""


def checkpoint(folder: Path, **options: Any) -> None:
    encoder = random_encoder()
    state = {f"speech_encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    cfg = {"model": {"_name": "skill_student", **encoder.config.to_dict()}, "task": {"normalize": False}}
    history = [{"num_updates": 7}]
    torch.save({"cfg": cfg, "model": state, "optimizer_history": history}, folder / "a.pt", **options)


def weights_and_index(folder: Path) -> None:
    save_huggingface(random_encoder(), folder / "a")
    from safetensors.torch import load_file

    state = load_file(folder / "a" / "model.safetensors")
    (folder / "a" / "model.safetensors").unlink()
    torch.save(state, folder / "a" / "pytorch_model-1.bin")
    index = {"weight_map": dict.fromkeys(state, "pytorch_model-1.bin")}
    (folder / "a" / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def graph(folder: Path) -> None:
    info = {"config": random_encoder().config.to_dict(), "provenance": {"source": "a.pt"}}
    with zipfile.ZipFile(folder / "a.pt2", "w") as archive:
        archive.writestr("a/extra/skill_fairseq.json", json.dumps(info))
        archive.writestr("a/data.bin", bytes(1000))


def onnx_graph(folder: Path) -> None:
    onnx = pytest.importorskip("onnx")
    value = onnx.helper.make_tensor_value_info("x", 1, ["n"])
    made = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [value], [value])
    model = onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 18)])
    info = {"config": random_encoder().config.to_dict(), "provenance": {"source": "a.pt"}}
    onnx.helper.set_model_props(model, {"skill_fairseq.json": json.dumps(info)})
    (folder / "a.onnx").write_bytes(model.SerializeToString())


GROUPS = "criterion:\n  _name: skill_group_kd  # ours\n  groups: [[0], [1, 2], [12]]\ntask:\n  data: here\n"


class Kind(NamedTuple):
    write: Callable[[Path], Any]
    read: Callable[[Path], Any]
    exact: bool = False  # whether a result read despite the change must equal the original


KINDS = {
    "safetensors": Kind(lambda d: save_encoder(random_encoder(), d / "a"), lambda d: load_encoder(d / "a")),
    "fairseq checkpoint": Kind(checkpoint, lambda d: load_encoder(d / "a.pt"), exact=True),
    "fairseq checkpoint, pickle protocol 4": Kind(
        lambda d: checkpoint(d, pickle_protocol=4), lambda d: load_encoder(d / "a.pt"), exact=True
    ),
    "fairseq checkpoint of an old torch": Kind(
        lambda d: checkpoint(d, _use_new_zipfile_serialization=False), lambda d: load_encoder(d / "a.pt")
    ),
    "Hugging Face folder": Kind(lambda d: save_huggingface(random_encoder(), d / "a"), lambda d: load_encoder(d / "a")),
    "Hugging Face folder in pieces": Kind(weights_and_index, lambda d: load_encoder(d / "a")),
    "Hugging Face folder of our own": Kind(
        lambda d: save_huggingface(random_encoder(ffn_dims=[3, None, 48]), d / "a"), lambda d: load_encoder(d / "a")
    ),
    "s3prl folder": Kind(lambda d: save_s3prl(random_encoder(), d / "a"), lambda d: load_encoder(d / "a")),
    "torch.export program": Kind(graph, lambda d: list(as_rows(describe(d / "a.pt2")))),
    "ONNX graph": Kind(onnx_graph, lambda d: list(as_rows(describe(d / "a.onnx")))),
    "groups": Kind(
        lambda d: (d / "groups.yaml").write_text(GROUPS),
        lambda d: parse_groups(read_groups(None, str(d / "groups.yaml")), [12]),
    ),
    "training config": Kind(
        lambda d: (d / "a.yaml").write_text(GROUPS),
        lambda d: merge_groups(read_config(d / "a.yaml"), [[0], [3]], str(d / "a.yaml")),
    ),
    "manifest": Kind(
        lambda d: (d / "a.tsv").write_text("/data\n" + "".join(f"a{i}.flac\t{16000 + i}\n" for i in range(20))),
        lambda d: read_manifest(d / "a.tsv"),
    ),
    "JSON": Kind(lambda d: write_json(d / "a.json", {"a": [1, 2.5, "x"], "b": {}}), lambda d: read_json(d / "a.json")),
}


def same(one: Any, two: Any) -> bool:
    return one.config == two.config and all(
        torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values())
    )


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_ends_in_a_clean_error_or_a_whole_result(name: str, tmp_path: Path) -> None:
    kind, dice = KINDS[name], random.Random(name)
    (tmp_path / "sound").mkdir()
    kind.write(tmp_path / "sound")
    whole = kind.read(tmp_path / "sound")
    files = [p.relative_to(tmp_path / "sound") for p in sorted((tmp_path / "sound").rglob("*")) if p.is_file()]
    files = [file for file in files if file.suffix not in (".py", ".md", ".txt")]  # nobody reads these
    errors = 0
    for number in range(CASES):
        folder = shutil.copytree(tmp_path / "sound", tmp_path / str(number))
        path = folder / dice.choice(files)
        path.write_bytes(spoiled(path.read_bytes(), number, dice))
        try:
            with bounds():
                found = kind.read(folder)
        except (ValueError, OSError) as error:
            assert "\x00" not in str(error) and len(str(error)) < 5000
            errors += 1
        else:
            assert not kind.exact or same(found, whole)
        shutil.rmtree(folder)
    assert errors > CASES // 4  # the damage is seen
