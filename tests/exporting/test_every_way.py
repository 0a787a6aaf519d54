"""A student exported to any format gives the same features on the same speech, in the real consumer."""

from __future__ import annotations

import json

import pytest
import torch

from skill_fairseq.checkpoints import load_encoder
from skill_fairseq.cli.export import main
from skill_fairseq.cli.info import main as skill_info
from skill_fairseq.exporting.traceable import NEEDED_TORCH

OLD_TORCH = tuple(int(number) for number in torch.__version__.split("+")[0].split(".")[:2]) < NEEDED_TORCH
new_torch = pytest.mark.skipif(
    OLD_TORCH, reason=f"torch.export needs torch >= {NEEDED_TORCH[0]}.{NEEDED_TORCH[1]}; this is {torch.__version__}"
)

LENGTHS = ((1, 720), (1, 721), (2, 1039), (1, 1040), (3, 5000), (1, 48000))
"""(batch, samples): around the smallest, and where the number of frames changes."""


@pytest.mark.formats("out", "skill_fairseq's safetensors", "load_encoder")
@pytest.mark.formats("in", "skill_fairseq's safetensors", "save_encoder")
def test_safetensors(exporting, student, export, speech):
    again = load_encoder(export("safetensors"))
    wanted = exporting.states_of(student, *speech)
    assert all(torch.equal(a, b) for a, b in zip(exporting.states_of(again, *speech), wanted))


@new_torch
@pytest.mark.slow
@pytest.mark.formats("out", "ONNX", "onnxruntime")
def test_onnx(exporting, student, export, speech):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(export("onnx")), options)
    assert [(i.name, i.shape) for i in session.get_inputs()] == [
        ("source", ["batch", "samples"]),
        ("padding_mask", ["batch", "samples"]),
    ]
    layers, width = student.config.encoder_layers, student.config.encoder_embed_dim
    names = ["x", *(f"hidden_state_{i}" for i in range(layers + 1)), "frame_padding_mask"]
    assert [output.name for output in session.get_outputs()] == names
    assert session.get_outputs()[0].shape == ["batch", "frames", width]

    def run(source, padding):
        x, *states, mask = session.run(None, {"source": source.numpy(), "padding_mask": padding.numpy()})
        return [*states, x], torch.from_numpy(mask)

    source, padding = speech
    states, mask = run(source, padding)
    exporting.assert_same(states, exporting.states_of(student, source, padding))
    assert torch.equal(mask, student(source, padding).padding_mask) and mask.any()
    for wrong in (padding[:, :-320], padding.long()):
        with pytest.raises(Exception, match="INVALID_ARGUMENT|Equal"):
            run(source, wrong)
    for batch, samples in ((1, 400), (2, 401), *LENGTHS):
        source = torch.randn(batch, samples, generator=torch.Generator().manual_seed(samples)) * 0.1
        states, mask = run(source, torch.zeros_like(source, dtype=torch.bool))
        exporting.assert_same(states, exporting.states_of(student, source))
        assert not mask.any()


@new_torch
@pytest.mark.slow
@pytest.mark.formats("out", "torch.export program", "torch.export.load")
def test_torch_program(exporting, student, export, speech):
    program = torch.export.load(export("torch")).module()
    crop = speech[0][:, : int((~speech[1]).sum(1).min())]  # without an input for padding: equal lengths
    noise = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.1 for shape in LENGTHS)
    for source in (speech[0][:1], crop, *noise):
        found = program(source)
        assert found.keys() == {"x", "hidden_states"}
        exporting.assert_same([*found["hidden_states"], found["x"]], exporting.states_of(student, source))


TRANSFORMERS = """
import glob
import shutil
import torch
from transformers import AutoFeatureExtractor, AutoModel

batch = torch.load(sys.argv[2])
extractor = AutoFeatureExtractor.from_pretrained(sys.argv[1])
inputs = extractor([w.numpy() for w in batch["waves"]], sampling_rate=16000, return_tensors="pt", padding=True)
model, report = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, output_loading_info=True)
assert not any(report.values()), report
assert not model.training and type(model).__name__ == "SkillModel"
with torch.no_grad():
    out = model(**inputs, output_hidden_states=True)
    longest = inputs["input_values"][:1]
    alone = model(longest)
    assert alone.hidden_states is None and torch.equal(model(longest, return_dict=False)[0], alone[0])
    model.save_pretrained(sys.argv[1] + " again")
    for file in glob.glob(sys.argv[1] + "/*.py"):  # transformers 4.30 leaves the code behind
        shutil.copy(file, sys.argv[1] + " again")
    again = AutoModel.from_pretrained(sys.argv[1] + " again", trust_remote_code=True)
    assert torch.equal(again(longest)[0], alone[0])
torch.save([*out.hidden_states, out.last_hidden_state], sys.argv[3])
imported = any(name.startswith("skill_fairseq.") for name in sys.modules)
print(type(extractor).__name__, model.config.hidden_size, imported)
"""


def as_waves(speech):
    source, padding = speech
    return [wave[~hidden] for wave, hidden in zip(source, padding)]


@pytest.mark.formats("out", "Hugging Face folder with its own code", "transformers")
def test_huggingface(exporting, student, export, speech, tmp_path):
    torch.save({"waves": as_waves(speech)}, tmp_path / "batch.pt")
    said = exporting.run_without_package(TRANSFORMERS, export("huggingface"), tmp_path / "batch.pt", tmp_path / "o.pt")
    assert said.split() == ["Wav2Vec2FeatureExtractor", "80", "False"]
    exporting.assert_same(torch.load(tmp_path / "o.pt"), exporting.states_of(student, *speech))


S3PRL = """
import torch
from s3prl.upstream.interfaces import Featurizer

sys.path.append(sys.argv[1])
from expert import UpstreamExpert  # as run_downstream.py --hub huggingface does

batch = torch.load(sys.argv[2])
upstream = torch.hub.load(sys.argv[1], "skill_student", source="local")
featurizer = Featurizer(upstream, upstream_device="cpu")  # as s3prl's run_downstream.py makes it
with torch.no_grad():
    out = upstream(batch["waves"])
    features = featurizer(batch["waves"], out)
    single = [upstream([wave]) for wave in batch["waves"]]
    expert = UpstreamExpert(ckpt=sys.argv[1] + "/model.safetensors", model_config=None, refresh=False)
    assert torch.equal(expert(batch["waves"])["hidden_states"][3], out["hidden_states"][3])
assert torch.allclose(features[0], sum(out["hidden_states"])[0] / len(out["hidden_states"]), atol=1e-5)
torch.save([*out["hidden_states"], out["last_hidden_state"]], sys.argv[3])
torch.save([[*one["hidden_states"], one["last_hidden_state"]] for one in single], sys.argv[3] + ".single")
assert any(parameter.requires_grad for parameter in expert.parameters())  # -f trains it
print(featurizer.output_dim, featurizer.downsample_rate, len(features), [len(f) for f in features] ==
      [round(len(wave) / 320) for wave in batch["waves"]])
"""


@pytest.mark.formats("out", "s3prl upstream", "s3prl")
def test_s3prl(exporting, student, export, speech, tmp_path):
    torch.save({"waves": as_waves(speech)}, tmp_path / "batch.pt")
    said = exporting.run_without_package(S3PRL, export("s3prl"), tmp_path / "batch.pt", tmp_path / "o.pt")
    assert said.splitlines()[-1] == "80 320 3 True"
    exporting.assert_same(torch.load(tmp_path / "o.pt"), exporting.states_of(student, *speech))
    for found, wave in zip(torch.load(tmp_path / "o.pt.single"), as_waves(speech)):
        exporting.assert_same(found, exporting.states_of(student, wave[None]))


@pytest.mark.parametrize(
    ("way", "format"),
    [
        ("safetensors", "an exported encoder"),
        pytest.param("onnx", "an ONNX graph of skill-export, opset 18", marks=[new_torch, pytest.mark.slow]),
        pytest.param("torch", "a torch.export program of skill-export", marks=[new_torch, pytest.mark.slow]),
        ("huggingface", "a Hugging Face folder of skill-export"),
        ("s3prl", "an s3prl upstream of skill-export"),
    ],
)
def test_info_knows_every_way(exporting, student, export, way, format, capsys):
    path = export(way)
    capsys.readouterr()
    assert skill_info([str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == format and found["types"] == ["float32"]
    assert found["parameters"] == student.num_parameters()
    assert found["macs_per_second"] == student.macs(1.0)
    assert found["sparsity"] == pytest.approx(1 - student.num_parameters() / 1_009_948)
    assert found["shape"] == student.config.to_dict() and found["gates"] == [] and found["normalize"] is False
    assert {name: found["provenance"].get(name) for name in exporting.PROVENANCE} == exporting.PROVENANCE


@pytest.mark.parametrize("way", ["huggingface", "s3prl"])
def test_folders_are_exported_again(exporting, student, export, speech, way, tmp_path):
    assert main([str(export(way)), str(tmp_path / "again.safetensors")]) == 0
    again = load_encoder(tmp_path / "again.safetensors")
    assert again.config == student.config
    wanted = exporting.states_of(student, *speech)
    assert all(torch.equal(a, b) for a, b in zip(exporting.states_of(again, *speech), wanted))
