"""A new objective in one file, with training: ``python new_objective.py`` instead of fairseq-hydra-train.

The student, with some frames masked, predicts teacher layers through heads (DistilHuBERT, arXiv:2110.01900), and
matches the teacher's attention, averaged over heads (as tried for STaR, arXiv:2312.09040).
"""

from dataclasses import dataclass, field
from typing import Any, List

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skill_fairseq.modules.taps import Tap
from skill_fairseq.objectives.loss import without_padding
from skill_fairseq.objectives.objective import Objective, register_objective


@dataclass
class HeadsAndMapsConfig:
    layers: List[int] = field(default_factory=lambda: [3])
    map_weight: float = 1.0


@register_objective("heads_and_maps", HeadsAndMapsConfig)
class HeadsAndMaps(Objective):
    def __init__(self, cfg: Any, student: Any, teachers: Any, field: str = "criterion") -> None:
        super().__init__(cfg, student, teachers, field)
        self.map_weight, last = cfg.map_weight, student.encoder_layers
        self.student_taps = [Tap((last,), transform=self.mask), Tap((last,), "mean_map")]
        self.teacher_taps = [*(Tap((i,)) for i in cfg.layers), Tap((teachers[0].encoder_layers,), "mean_map")]
        widths = student.encoder_embed_dim, teachers[0].encoder_embed_dim
        self.mask_emb = nn.Parameter(torch.zeros(widths[0]))
        self.heads = nn.ModuleList(nn.Linear(*widths) for _ in cfg.layers)

    def mask(self, x: Tensor, padding_mask: Any) -> Tensor:
        masked = torch.arange(x.size(1), device=x.device) % 4 == 0
        return torch.where(masked[:, None], self.mask_emb.to(x.dtype), x)

    def forward(self, student: Any, teacher: Any, padding_mask: Any = None, sample: Any = None) -> Any:
        *states, wanted = teacher
        rows = [*(head(student[0]) for head in self.heads), *states, student[1], wanted]
        if padding_mask is not None:
            rows = without_padding(rows, padding_mask)
        *pairs, own, wanted = rows
        predicted, states = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]
        mse = torch.stack([F.mse_loss(p, t) for p, t in zip(predicted, states)]).mean()
        kl = (torch.xlogy(wanted, wanted) - torch.xlogy(wanted, own.clamp(min=1e-9))).sum(-1).mean()
        return mse + self.map_weight * kl, {"mse": mse, "kl": kl}

    def settings(self, cfg: Any) -> Any:
        return {"layers": list(cfg["layers"])} if "layers" in cfg else {}


if __name__ == "__main__":
    from fairseq_cli.hydra_train import cli_main

    cli_main()
