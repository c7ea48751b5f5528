from __future__ import annotations

import pytest

from qpipe.errors import GateError, RecipeError
from qpipe.gate import check_gate

FIGURES = {"fp32": {"top1_percent": 90.0}, "simulated": {"top1_percent": 88.5, "sqnr_db": 17.0}}


def test_bounds_that_hold_pass() -> None:
    check_gate(FIGURES)
    check_gate(FIGURES, max_drop=1.5)
    check_gate(FIGURES, metric="sqnr_db", min=17.0)


def test_a_drop_beyond_the_bound_names_the_variant_and_both_figures() -> None:
    with pytest.raises(GateError, match=r"simulated top1_percent is 88.5, 1.5 below fp32; at most 1 "):
        check_gate(FIGURES, max_drop=1)


def test_a_value_below_the_least_is_refused() -> None:
    with pytest.raises(GateError, match="at least 18"):
        check_gate(FIGURES, metric="sqnr_db", min=18)


def test_a_metric_nobody_measured_is_a_mistake() -> None:
    with pytest.raises(RecipeError, match="measured: top1_percent, sqnr_db"):
        check_gate(FIGURES, metric="top5_percent", min=1)
    with pytest.raises(RecipeError, match="sqnr_db"):
        check_gate(FIGURES, metric="sqnr_db", max_drop=1)


def test_a_float_model_without_metrics_needs_one_named() -> None:
    with pytest.raises(RecipeError, match=r"the gate has no metric: .* give gate.metric="):
        check_gate({"fp32": {}, "simulated": {"sqnr_db": 17.0}}, max_drop=1)
