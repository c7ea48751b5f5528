"""Learn for each weight whether it is rounded up or down."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qpipe import FinetuneStrategy, hookimpl
from qpipe_methods.finetune._layerwise import LayerwiseStrategy, check_even
from qpipe_methods.quadratic import Levels, fall_back, goal_of, keep
from qpipe_methods.reconstruction import Layer

_GAMMA, _ZETA = -0.1, 1.1


class AdaRound(LayerwiseStrategy):
    """Minimize each layer's output error over a relaxed choice of floor or ceiling, annealed until it is one.

    The error is taken over all samples at once, from second moments, before the activation function. It
    is kept where it has less error than rounding to nearest, output by output.

    Args:
        iterations: Adam steps a layer.
        lr: of Adam.
        regularization: weight of sum(1 - |2 h - 1|^beta), in units of rounding's error a weight.
        beta: first and last exponent.
        warm_start: share of the iterations without regularization.
        match, ridge: as for GPTQ.
        num_samples: of the calibration set.
        memory_gb: for activations.

    Source: Nagel et al., 2020, arXiv 2004.10568, eqs. 21 to 25.
    Equation: min ‖W x - s (floor(W / s) + h(V)) x‖² + λ Σ (1 - |2 h(V) - 1|^β)
    """

    name = "adaround"

    def __init__(
        self,
        iterations: int = 500,
        lr: float = 0.02,
        regularization: float = 1000.0,
        beta: tuple[float, float] = (20.0, 2.0),
        warm_start: float = 0.2,
        match: str = "layer",
        ridge: float = 0.1,
        num_samples: int = 128,
        memory_gb: float = 4.0,
    ) -> None:
        super().__init__(num_samples, memory_gb)
        if match not in ("layer", "float"):
            raise ValueError(f"match is layer or float, not {match!r}")
        self.iterations = iterations
        self.lr = lr
        self.regularization = regularization
        self.beta = beta
        self.warm_start = warm_start
        self.match = match
        self.ridge = ridge

    def check_prepared(self, model: nn.Module) -> None:
        """Raise RecipeError where a layer's levels are not evenly spaced."""
        check_even(self.name, model)

    def improve(self, layer: Layer) -> None:
        """Replace the weight by its learned rounding."""
        levels, goal = Levels(layer), goal_of(layer, self.match, self.ridge)
        rounding = Rounding(goal.aim.float(), levels)
        nearest = levels.round(goal.aim)
        unit = float((goal.error(nearest).sum() / nearest.numel()).clamp(min=1e-30))
        self._learn(rounding, goal.aim.float(), goal.xx.float() / unit)
        rounded = rounding.weight((rounding.h() > 0.5).float()).to(nearest)
        fall_back(rounded, nearest, goal.error)
        keep(layer, levels, rounded, goal)

    def _learn(self, rounding: Rounding, aim: Tensor, xx: Tensor) -> None:
        optimizer = torch.optim.Adam([rounding.v], lr=self.lr, fused=True)
        start = int(self.warm_start * self.iterations)
        for i in range(self.iterations):
            progress = (i - start) / max(1, self.iterations - start)
            beta = self.beta[0] + (self.beta[1] - self.beta[0]) * progress
            strength = self.regularization if i >= start else 0.0
            rounding.v.grad = rounding.gradient(aim, xx, strength, beta)
            optimizer.step()


class Rounding:
    """A weight between floor and ceiling: scale * clip(floor(w / scale) + h), eq. 22.

    Args:
        weight: [G, O, K].
    """

    def __init__(self, weight: Tensor, levels: Levels) -> None:
        spec = levels.fake_quant.slot.spec
        self.scale, zero_point = levels.per_element()
        self.low, self.high = spec.quant_min - zero_point, spec.quant_max - zero_point
        ratio = weight / self.scale
        self.floor = ratio.floor()
        self.v = inverse_h((ratio - self.floor).clamp(0.001, 0.999))

    def h(self) -> Tensor:
        """Return the rectified sigmoid of v, 0 to 1 (eq. 23)."""
        return rectified(torch.sigmoid(self.v))

    def weight(self, h: Tensor) -> Tensor:
        """Return the weight for a choice h."""
        return (self.floor + h).clamp(self.low, self.high) * self.scale

    def gradient(self, aim: Tensor, xx: Tensor, strength: float, beta: float) -> Tensor:
        """Return the derivative by v of (w - aim) xx (w - aim)' + strength * regularizer(h, beta).

        The error is a quadratic form, so one product gives its derivative; autograd would take two.
        """
        sigmoid = torch.sigmoid(self.v)
        h = rectified(sigmoid)
        codes = self.floor + h
        within = (codes >= self.low) & (codes <= self.high)
        slope = 2 * ((self.weight(h) - aim) @ xx) * self.scale * within
        if strength:
            distance = 2 * h - 1
            slope -= strength * 2 * beta * distance.abs().pow(beta - 1) * distance.sign()
        return slope * sigmoid * (1 - sigmoid) * ((h > 0) & (h < 1)) * (_ZETA - _GAMMA)


def rectified(sigmoid: Tensor) -> Tensor:
    """Stretch a sigmoid and clip it to 0 .. 1 (eq. 23)."""
    return (sigmoid * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)


def inverse_h(h: Tensor) -> Tensor:
    """Return v whose rectified sigmoid is h."""
    return -torch.log((_ZETA - _GAMMA) / (h - _GAMMA) - 1)


def regularizer(h: Tensor, beta: float) -> Tensor:
    """Return sum(1 - |2 h - 1|^beta), 0 where every h is 0 or 1 (eq. 24)."""
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


@hookimpl
def qpipe_register_finetune() -> list[type[FinetuneStrategy]]:
    """Offer AdaRound."""
    return [AdaRound]
