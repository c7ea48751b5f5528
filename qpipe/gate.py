"""What a result must reach to be accepted."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from qpipe.errors import GateError, RecipeError

_Row = Mapping[str, float]
_SMALLER_IS_BETTER = ("ms", "bytes", "perplexity", "loss", "nats")


def better_low(name: str) -> bool:
    """Whether less of a metric is better, by the last word of its name: size_bytes, onnx.perplexity."""
    return re.split(r"[._]", name)[-1] in _SMALLER_IS_BETTER


@dataclass(frozen=True)
class Gate:
    """A bound on one metric of every quantized variant; open where neither max_drop nor min is given.

    Args:
        metric: the name looked at; None: the first that the float model has.
        max_drop: what may be lost from the float model, in the metric's unit: added, where less is better.
        min: the least value.

    Raises:
        RecipeError: a bound is no number.
    """

    metric: str | None = None
    max_drop: float | None = None
    min: float | None = None

    def __post_init__(self) -> None:
        for key in ("max_drop", "min"):
            value = getattr(self, key)
            if value is not None and type(value) not in (int, float):
                raise RecipeError(
                    f"gate.{key}={value} is no number; give one in the metric's unit, gate.{key}=1.0"
                )

    @property
    def is_open(self) -> bool:
        """Whether everything passes."""
        return self.max_drop is None and self.min is None

    def name(self, fp32: Collection[str]) -> str:
        """Return the metric looked at, given those of the float model; '' where there is none."""
        return self.metric or next(iter(fp32), "")

    def expect(self, fp32: Collection[str], quantized: Collection[str]) -> None:
        """Refuse a metric that is not among those measured of the float model and of a quantized one.

        Raises:
            RecipeError: says what is measured, and of what.
        """
        name = self.name(fp32)
        if self.is_open or (name in quantized and (self.max_drop is None or name in fp32)):
            return
        if not name:
            raise RecipeError("the gate has no metric: the float model has none; give gate.metric=…")
        if name in quantized:
            raise RecipeError(
                f"gate.max_drop compares {name} with the float model, which has none; give gate.min=… "
                f"or another gate.metric: {', '.join(fp32) or 'the float model has none'}"
            )
        known = ", ".join(dict.fromkeys([*fp32, *quantized])) or "nothing"
        raise RecipeError(f"gate.metric={name} is not measured; measured: {known}")

    def miss(self, fp32: _Row, row: _Row) -> str | None:
        """Say by how much a variant misses a bound; None where it meets both, or has no such metric."""
        name = self.name(fp32)
        if name not in row:
            return None
        value = row[name]
        if self.min is not None and value < self.min:
            return f"{name} is {value:.4g}, at least {self.min:.4g} was asked for"
        if self.max_drop is None:
            return None
        lost, side = (value - fp32[name], "above") if better_low(name) else (fp32[name] - value, "below")
        if lost > self.max_drop:
            drop = f"{name} is {value:.4g}, {lost:.4g} {side} fp32"
            return f"{drop}; at most {self.max_drop:.4g} was allowed"
        return None

    def check(self, figures: Mapping[str, _Row]) -> None:
        """Hold every quantized variant to the bounds.

        Args:
            figures: metrics by variant and name.

        Raises:
            RecipeError: the metric was not measured.
            GateError: a variant misses a bound.
        """
        fp32 = figures["fp32"]
        rows = {variant: row for variant, row in figures.items() if variant != "fp32"}
        self.expect(fp32, [name for row in rows.values() for name in row])
        for variant, row in rows.items():
            if not self.is_open and (miss := self.miss(fp32, row)):
                raise GateError(f"gate not met: {variant} {miss}")
