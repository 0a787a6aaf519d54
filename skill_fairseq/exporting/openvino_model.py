"""Exports an encoder to OpenVINO, whose converter reads the ONNX graph, and runs it."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch
from torch import Tensor

from skill_fairseq.checkpoints.plain_files import parse_fields
from skill_fairseq.exporting.traceable import INFO_NAME, describe_graph
from skill_fairseq.files import PathLike, write_file
from skill_fairseq.messages import require
from skill_fairseq.modules.config import EncoderConfig
from skill_fairseq.modules.encoder import SpeechEncoder

HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
"""OpenVINO's names of compute precisions."""


def convert(model: bytes) -> Any:
    """Converts an ONNX graph of skill-export to an OpenVINO model.

    Raises:
        ValueError: OpenVINO is missing.
    """
    require("openvino", "openvino")
    import openvino

    return openvino.convert_model(io.BytesIO(model))


def save_openvino(
    model: bytes, path: PathLike, encoder: SpeechEncoder, provenance: Mapping[str, Any], facts: Mapping[str, Any]
) -> None:
    """Writes OUT.xml, and OUT.bin with the weights beside it.

    Args:
        model: an ONNX graph of skill-export.
        path: the file to write, ending in ``.xml``.
        encoder: the encoder that the graph computes.
        provenance: the encoder's origin; kept in the file, with shape and facts.
        facts: facts about the graph; weights are stored in float16 if ``precision`` is fp16.

    Raises:
        ValueError: OpenVINO is missing.
    """
    import openvino

    made = convert(model)
    made.set_rt_info(describe_graph(encoder, provenance, **facts), INFO_NAME)
    path = Path(path)
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "model.xml"
        openvino.save_model(made, xml, compress_to_fp16=facts.get("precision") == "fp16")
        write_file(path.with_suffix(".bin"), xml.with_suffix(".bin").read_bytes())  # the .xml refers to it
        write_file(path, xml.read_bytes())


class OpenvinoEncoder:
    """An encoder written by ``skill-export --to openvino``, ready to run on a CPU.

    Args:
        model: path of the ``.xml``, or a model from :func:`convert`.
        threads: threads per forward; None: OpenVINO's choice.
        precision: compute precision: "fp32", "bf16" or "fp16".

    Attributes:
        outputs: names of the states, as in the ONNX graph.
        config: the encoder's shape if loaded from a file, else None.

    Raises:
        ValueError: OpenVINO is missing, or the file is not from skill-export.
    """

    def __init__(self, model: Union[str, Path, Any], threads: Optional[int] = None, precision: str = "fp32") -> None:
        require("OpenvinoEncoder", "openvino")
        import openvino

        self.config: Optional[EncoderConfig] = None
        core = openvino.Core()
        if isinstance(model, (str, Path)):
            name, model = str(model), core.read_model(model)
            if not model.has_rt_info(INFO_NAME):
                raise ValueError(f"{name}: has no {INFO_NAME}; expected a model of skill-export --to openvino")
            info: Mapping[str, Any] = parse_fields(model.get_rt_info(INFO_NAME).value, Path(name), "its description")
            self.config = EncoderConfig.from_dict(info["config"])
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": HINTS[precision], "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        self.compiled = core.compile_model(model, "CPU", settings)
        self.inputs = [value.any_name for value in self.compiled.inputs]
        self.outputs = [value.any_name for value in self.compiled.outputs if value.any_name != "frame_padding_mask"]

    def __call__(self, source: np.ndarray) -> dict[str, np.ndarray]:
        """(B, N) float32 samples, normalised if the encoder expects it, to (B, T, D) by output name."""
        source = np.ascontiguousarray(source, dtype=np.float32)
        feeds = {"source": source, "padding_mask": np.zeros(source.shape, dtype=bool)}
        found = self.compiled({name: feeds[name] for name in self.inputs})
        return {name: np.array(found[name]) for name in self.outputs}

    def states(self, source: Tensor) -> dict[str, Tensor]:
        """The same for torch tensors on the CPU."""
        return {name: torch.from_numpy(value) for name, value in self(source.numpy()).items()}
