"""Exports an encoder to an s3prl upstream: a folder with weights, code and s3prl's entry points."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from skill_fairseq.checkpoints.export import save_encoder
from skill_fairseq.checkpoints.own_folders import UPSTREAM
from skill_fairseq.exporting.bundle import bundle
from skill_fairseq.exporting.folder import atomic_folder
from skill_fairseq.exporting.model_card import model_card
from skill_fairseq.files import PathLike
from skill_fairseq.modules.encoder import SpeechEncoder

EXPERT = f'''"""s3prl imports UpstreamExpert from this file when the folder is on the Hugging Face hub."""

from {UPSTREAM}.s3prl_expert import UpstreamExpert

__all__ = ["UpstreamExpert"]
'''

HUBCONF = f'''"""torch.hub.load(FOLDER, "{UPSTREAM}", source="local")"""

from {UPSTREAM}.s3prl_expert import UpstreamExpert as _UpstreamExpert

dependencies = ["torch", "numpy", "safetensors"]


def {UPSTREAM}(*args, **kwargs):
    """The upstream; see _UpstreamExpert for its arguments."""
    return _UpstreamExpert(*args, **kwargs)
'''

RUN = f'''"""s3prl's run_downstream.py with all its options and one more upstream: -u {UPSTREAM}."""

import runpy

from hubconf import {UPSTREAM}
from s3prl import hub

hub.{UPSTREAM} = {UPSTREAM}
runpy.run_module("s3prl.run_downstream", run_name="__main__")
'''

REQUIREMENTS = "torch\nnumpy\nsafetensors\n"

USAGE = f"""
# shell, in s3prl's folder s3prl/:  python FOLDER/run_downstream.py -m train -u {UPSTREAM} -d ctc -n NAME
import torch

upstream = torch.hub.load("FOLDER", "{UPSTREAM}", source="local")
states = upstream([wave])["hidden_states"]  # wave: (N,) floats; states: (1, T, D) each
"""


def save_s3prl(
    encoder: SpeechEncoder,
    folder: PathLike,
    provenance: Optional[Mapping[str, Any]] = None,
    dtype: str = "float32",
    notes: str = "",
) -> None:
    """Writes a folder that an unmodified s3prl can run without this package.

    s3prl finds upstreams by name in its module ``s3prl.hub``. The folder's ``run_downstream.py`` adds a name there and
    then runs s3prl's own: ``python FOLDER/run_downstream.py -u skill_student``, with all other options unchanged. The
    folder is also a ``torch.hub`` repository, and on the Hugging Face hub it works with ``run_downstream.py --hub
    huggingface -u USER/NAME --upstream_model_name model.safetensors``.

    Args:
        encoder: an encoder; gates are exported too.
        folder: the folder to create.
        provenance: the encoder's origin; kept in the weights' file and in the model card.
        dtype: dtype of the weights in the file, "float32", "float16" or "bfloat16".
        notes: Markdown for the end of the model card.

    Raises:
        ValueError: the dtype is unknown, a weight is out of its range, or the encoder is not for s3prl's 16 kHz.
        FileExistsError: the folder exists.
    """
    if encoder.config.sample_rate != 16000:
        raise ValueError(
            f"the encoder is for waveforms of {encoder.config.sample_rate} Hz, but s3prl gives all upstreams 16000 Hz: "
            "export to another format"
        )
    with atomic_folder(folder) as temporary:
        save_encoder(encoder, temporary / "model.safetensors", provenance, dtype)
        card = model_card(encoder, provenance or {}, USAGE, "s3prl", notes=notes)
        files = {
            "expert.py": EXPERT,
            "hubconf.py": HUBCONF,
            "run_downstream.py": RUN,
            "requirements.txt": REQUIREMENTS,
            "README.md": card,
            f"{UPSTREAM}/__init__.py": "",
        }
        code = bundle("skill_fairseq.exporting.s3prl_expert")
        files.update({f"{UPSTREAM}/{name}": text for name, text in code.items()})
        for name, text in files.items():
            _write(temporary / name, text)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
