"""What a result must reach to be accepted."""

from __future__ import annotations

from collections.abc import Mapping

from qpipe.errors import GateError, RecipeError

_Figures = Mapping[str, Mapping[str, float]]


def check_gate(
    figures: _Figures, metric: str | None = None, max_drop: float | None = None, min: float | None = None
) -> None:
    """Hold every quantized variant to a bound; nothing is checked where neither bound is given.

    Args:
        figures: metrics by variant and name.
        metric: the name looked at; None: the first that the float model has.
        max_drop: what may be lost from the float model, in the metric's unit.
        min: the least value.

    Raises:
        RecipeError: the metric was not measured.
        GateError: a variant misses a bound.
    """
    if max_drop is None and min is None:
        return
    fp32 = figures["fp32"]
    name = metric or next(iter(fp32), "")
    found = {variant: row[name] for variant, row in figures.items() if variant != "fp32" and name in row}
    if not found or (max_drop is not None and name not in fp32):
        if not name:
            raise RecipeError("the gate has no metric: the float model has none; give gate.metric=…")
        known = ", ".join(dict.fromkeys(key for row in figures.values() for key in row))
        raise RecipeError(f"gate.metric={name} was not measured; measured: {known or 'nothing'}")
    for variant, value in found.items():
        if min is not None and value < min:
            raise GateError(
                f"gate not met: {variant} {name} is {value:.4g}, at least {min:.4g} was asked for"
            )
        if max_drop is not None and fp32[name] - value > max_drop:
            raise GateError(
                f"gate not met: {variant} {name} is {value:.4g}, {fp32[name] - value:.4g} below fp32; "
                f"at most {max_drop:.4g} was allowed"
            )
