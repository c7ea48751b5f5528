"""The solver and what it adds up."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qpipe_methods.allocation import Ledger, front, multiplications
from qpipe_methods.sensitivity import Candidates
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import nn

from qpipe.nn import FakeQuant, QuantizedWeight

LAYERS = st.lists(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=3, max_size=3),
    min_size=4,
    max_size=4,
)


def split(layers: list[list[tuple[int, int]]]) -> tuple[list[list[int]], list[list[float]]]:
    return [[c for c, _ in row] for row in layers], [[float(loss) for _, loss in row] for row in layers]


@settings(max_examples=100, deadline=None)
@given(LAYERS, st.integers(0, 120))
def test_the_choice_is_that_of_trying_all(layers: list[list[tuple[int, int]]], limit: int) -> None:
    costs, losses = split(layers)
    every = [(sum(c for c, _ in row), sum(loss for _, loss in row)) for row in itertools.product(*layers)]
    within = [loss for cost, loss in every if cost <= limit]
    points = front(costs, losses)
    best = points.best(limit)
    assert (best is None) == (not within)
    if best is not None:
        picks = points.picks[:, best]
        assert sum(row[i] for row, i in zip(costs, picks, strict=True)) == points.costs[best] <= limit
        assert sum(row[i] for row, i in zip(losses, picks, strict=True)) == points.losses[best] == min(within)


@settings(max_examples=50, deadline=None)
@given(LAYERS)
def test_the_front_holds_no_point_that_another_beats(layers: list[list[tuple[int, int]]]) -> None:
    points = front(*split(layers))
    assert (np.diff(points.costs) > 0).all()
    assert (np.diff(points.losses) < 0).all()


def test_the_choice_is_that_of_an_integer_program() -> None:
    """HiGHS, an independent solver, finds the same least loss for 24 layers of six widths."""
    generator = np.random.default_rng(0)
    costs = generator.integers(1, 400, (24, 1)) * np.array([2, 3, 4, 5, 6, 8])
    losses = generator.lognormal(0, 1.5, (24, 1)) * 4.0 ** -np.array([2, 3, 4, 5, 6, 8]) * 1e3
    limit = int(costs[:, 2].sum())
    one_each = LinearConstraint(np.kron(np.eye(24), np.ones(6)), 1, 1)
    within = LinearConstraint(costs.reshape(1, -1), -np.inf, limit)
    found = milp(
        losses.ravel(),
        constraints=[one_each, within],
        integrality=np.ones(144),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0},
    )
    points = front(costs.tolist(), losses.tolist())
    assert points.losses[points.best(limit)] == pytest.approx(found.fun, rel=1e-9)


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Linear(6, 5), (2, 7, 6), 7 * 6 * 5),
        (nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), (2, 4, 10, 10), 25 * 8 * 2 * 9),
        (nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (2, 4, 5, 5), 25 * 4 * 3 * 4),
        (nn.Embedding(10, 3), None, 0),
    ],
)
def test_multiplications_are_counted_for_one_sample(layer: Any, shape: Any, macs: int) -> None:  # noqa: ANN401
    x = torch.randn(shape) if shape else torch.zeros(2, 4, dtype=torch.long)
    weight = QuantizedWeight("weight", layer, "weight", FakeQuant(None, "weight"))  # type: ignore[arg-type]
    assert multiplications([Candidates("", (weight,), ())], layer, ((x,), {})) == {"": macs}


def test_a_budget_of_at_most_one_is_a_share() -> None:
    ledger = Ledger("bytes", [], fixed=100, whole=1000)
    assert [ledger.limit(budget) for budget in (0.25, 1, 400, 0.05)] == [150, 900, 300, -50]
    assert ledger.in_words(150) == "250 bytes (0.25 of fp32)"
    per_weight = Ledger("bits", [], fixed=0, whole=1000, per_weight=True)
    assert [per_weight.limit(budget) for budget in (1, 3.5)] == [1000, 3500]
