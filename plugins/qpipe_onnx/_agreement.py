"""How closely an executed file agrees with the simulation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Agreement:
    """Figures of the comparison."""

    agreement_percent: float
    sqnr_db: float
    max_difference_steps: float
    rms_difference_steps: float

    @classmethod
    def between(cls, executed: Sequence[Tensor], simulated: Sequence[Tensor], class_dim: int | None) -> Self:
        e = torch.cat([x.flatten(0, -2) for x in executed])
        s = torch.cat([x.flatten(0, -2) for x in simulated])
        step = (s.max() - s.min()) / 255
        d = e - s
        return cls(
            float((e.argmax(-1) == s.argmax(-1)).double().mean() * 100),
            float(10 * torch.log10(s.square().sum() / d.square().sum())),
            float(d.abs().max() / step),
            float(d.square().mean().sqrt() / step),
        )

    def check(self) -> None:
        pass
