from __future__ import annotations

import pytest

from qpipe.errors import GateError, RecipeError
from qpipe.gate import Gate

FIGURES = {"fp32": {"top1_percent": 90.0}, "simulated": {"top1_percent": 88.5, "sqnr_db": 17.0}}


def test_bounds_that_hold_pass() -> None:
    Gate().check(FIGURES)
    Gate(max_drop=1.5).check(FIGURES)
    Gate(metric="sqnr_db", min=17.0).check(FIGURES)


def test_a_drop_beyond_the_bound_names_the_variant_and_both_figures() -> None:
    with pytest.raises(GateError, match=r"simulated top1_percent is 88.5, 1.5 below fp32; at most 1 "):
        Gate(max_drop=1).check(FIGURES)


def test_a_value_below_the_least_is_refused() -> None:
    with pytest.raises(GateError, match="at least 18"):
        Gate(metric="sqnr_db", min=18).check(FIGURES)


def test_a_metric_nobody_measured_is_a_mistake() -> None:
    with pytest.raises(RecipeError, match="measured: top1_percent, sqnr_db"):
        Gate(metric="top5_percent", min=1).check(FIGURES)
    with pytest.raises(RecipeError, match=r"compares sqnr_db with the float model.*gate.min=.*top1_percent"):
        Gate(metric="sqnr_db", max_drop=1).check(FIGURES)


def test_a_float_model_without_metrics_needs_one_named() -> None:
    with pytest.raises(RecipeError, match=r"the gate has no metric: .* give gate.metric="):
        Gate(max_drop=1).check({"fp32": {}, "simulated": {"sqnr_db": 17.0}})


def test_words_are_no_bounds() -> None:
    with pytest.raises(RecipeError, match=r"gate.min=high is no number"):
        Gate(min="high")  # type: ignore[arg-type]  # what the command line may hold


@pytest.mark.parametrize(
    "name", ["size_bytes", "latency_p95_ms", "perplexity", "other_perplexity", "loss_nats"]
)
def test_what_is_better_when_smaller_is_lost_upwards(name: str) -> None:
    def figures(value: float) -> dict[str, dict[str, float]]:
        return {"fp32": {name: 20.0}, "simulated": {name: value}}

    Gate(max_drop=0).check(figures(5.0))
    Gate(max_drop=1).check(figures(21.0))
    with pytest.raises(GateError, match=f"{name} is 21.5, 1.5 above fp32; at most 1 was allowed"):
        Gate(max_drop=1).check(figures(21.5))
