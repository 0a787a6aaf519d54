"""A pruned speech encoder as an s3prl upstream. It needs only torch, numpy and safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from skill_fairseq.checkpoints.export import read_export
from skill_fairseq.checkpoints.source import build_encoder


class UpstreamExpert(nn.Module):
    """s3prl's interface of an upstream (its upstream/example/expert.py).

    Args:
        ckpt: a file of ``skill-export``; None: model.safetensors in the upstream's folder.
        model_config, kwargs: passed by s3prl, not used; the file describes itself.

    Raises:
        ValueError: it is another kind of file.
    """

    def __init__(self, ckpt: Optional[str] = None, model_config: Optional[str] = None, **kwargs: Any) -> None:
        super().__init__()
        path = Path(ckpt) if ckpt else Path(__file__).resolve().parents[1] / "model.safetensors"
        self.encoder = build_encoder(read_export(path), path).eval()

    def get_downsample_rates(self, key: Optional[str] = None) -> int:
        """Samples per frame, for any feature: 320 for published models."""
        return self.encoder.config.downsampling

    def forward(self, wavs: List[Tensor]) -> Dict[str, Union[Tensor, List[Tensor]]]:
        """Encodes utterances of any length.

        Args:
            wavs: B tensors (N_i,), 16 kHz; they are normalised here if the model expects it.

        Returns:
            ``hidden_states``, L + 1 tensors (B, T, D): [0] before the positional convolution, [i] after layer i;
            ``last_hidden_state`` (B, T, D), the encoder's output.
        """
        if self.encoder.normalize:
            wavs = [F.layer_norm(wav, wav.shape) for wav in wavs]
        lengths = torch.tensor([len(wav) for wav in wavs], device=wavs[0].device)
        source = pad_sequence(wavs, batch_first=True)
        padding = torch.arange(source.size(1), device=source.device) >= lengths[:, None]
        out = self.encoder(source, padding if bool(padding.any()) else None)
        return {"hidden_states": list(out.hidden_states), "last_hidden_state": out.x}
