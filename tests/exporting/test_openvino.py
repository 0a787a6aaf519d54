"""``skill-export --to openvino``: OpenVINO's results compared with the student's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from messages import says

from skill_fairseq.checkpoints import save_encoder
from skill_fairseq.cli.export import main

openvino = pytest.importorskip("openvino")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(student, tmp_path_factory):
    path = tmp_path_factory.mktemp("student") / "student.safetensors"
    save_encoder(student, path)
    return path


@pytest.mark.formats("out", "OpenVINO model in fp32, fp16 or int8", "OpenVINO")
@pytest.mark.parametrize("precision, limit", [("fp32", 1e-4), ("fp16", 2e-3), ("int8", 0.05)])
def test_openvino_computes_what_the_student_does(precision, limit, checkpoint, student, tmp_path: Path) -> None:
    from skill_fairseq.exporting.openvino_model import OpenvinoEncoder

    out = tmp_path / "student.xml"
    assert main([str(checkpoint), str(out), "--precision", precision]) == 0
    encoder = OpenvinoEncoder(out, threads=1)
    assert encoder.config == student.config
    assert len(encoder.outputs) == student.config.encoder_layers + 2
    for batch, samples in ((1, 8000), (2, 12345)):
        source = torch.randn(batch, samples, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            wanted = student(source)
        found = encoder.states(source)
        states = {"x": wanted.x, **{f"hidden_state_{i}": state for i, state in enumerate(wanted.hidden_states)}}
        assert found.keys() == states.keys()
        for name, state in states.items():
            assert float((found[name] - state).abs().sum() / state.abs().sum()) <= limit, name


def test_chosen_layers_of_one_length(checkpoint, tmp_path: Path) -> None:
    from skill_fairseq.exporting.openvino_model import OpenvinoEncoder

    out = tmp_path / "layers.xml"
    assert main([str(checkpoint), str(out), "--layers", "1,2", "--seconds", "1"]) == 0
    encoder = OpenvinoEncoder(str(out))
    assert encoder.outputs == ["hidden_state_1", "hidden_state_2"]
    assert encoder(np.zeros((1, 16000)))["hidden_state_2"].shape[:2] == (1, 49)


def test_a_foreign_model_is_refused(tmp_path: Path) -> None:
    from skill_fairseq.exporting.openvino_model import OpenvinoEncoder

    parameter = openvino.opset8.parameter([1], np.float32)
    openvino.save_model(openvino.Model([parameter], [parameter], "other"), tmp_path / "other.xml")
    with pytest.raises(ValueError, match=says("expected a model of skill-export --to openvino")):
        OpenvinoEncoder(tmp_path / "other.xml")
