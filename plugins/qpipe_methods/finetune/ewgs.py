"""Scale gradients by the rounding error."""

from __future__ import annotations

from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from qpipe import FinetuneStrategy, Learner, QParams, Slot, hookimpl
from qpipe.nn import FakeQuant
from qpipe.training import Training
from qpipe_methods.finetune.lsq import LSQ, LearnedStep


class EWGS(LSQ):
    """Train as LSQ does, the gradient of x enlarged where it would move x away from its level.

    Args:
        init: of the steps, see LSQ.
        delta: strength, for x in units of its step; fixed, where the paper also derives it from the Hessian.
        training: see TrainingStrategy.

    Source: Lee et al., "Network Quantization with Element-wise Gradient Scaling", 2021, arXiv 2104.00903,
    eq. 4.
    Equation: g_x = g_q (1 + δ sign(g_q) (x - q))
    """

    name = "ewgs"

    def __init__(
        self,
        init: Literal["lsq", "calibrated"] = "lsq",
        delta: float = 1e-3,
        **training: Unpack[Training],
    ) -> None:
        if delta < 0:
            raise ValueError(f"delta={delta} is negative")
        super().__init__(init, **training)
        self.delta = delta

    def learner(self, fake_quant: FakeQuant) -> Learner | None:
        """Return a learned step with scaled gradients where codes have a step."""
        slot = fake_quant.slot
        if not slot.quantizer.is_affine(slot.spec):
            return None
        return ScaledStep(slot, fake_quant.qparams(), self.delta)


class ScaledStep(LearnedStep):
    """Fake-quantize with a learned step; see EWGS."""

    def __init__(self, slot: Slot, start: QParams, delta: float) -> None:
        super().__init__(slot, start)
        self.delta = delta

    def forward(self, x: Tensor) -> Tensor:
        """Round x."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return super().forward(x)
        scaled: Tensor = _Elementwise.apply(x, self._error(x), self.delta)  # type: ignore[no-untyped-call]
        return super().forward(scaled)

    def _error(self, x: Tensor) -> Tensor:
        """Return x - q in steps."""
        with torch.no_grad():
            granularity = self.slot.granularity
            difference = x - super().forward(x)
            return granularity.from_blocks(granularity.to_blocks(difference) / self.scale, x.shape)


class _Elementwise(torch.autograd.Function):
    """Return x; its gradient g becomes g (1 + delta sign(g) error)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, error: Tensor, delta: float) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(error)
        ctx.delta = delta
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        (error,) = ctx.saved_tensors
        return grads[0] * (1 + ctx.delta * grads[0].sign() * error), None, None


@hookimpl
def qpipe_register_finetune() -> list[type[FinetuneStrategy]]:
    """Offer element-wise gradient scaling."""
    return [EWGS]
