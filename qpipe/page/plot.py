"""Scales, ticks and places of what a template draws."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from qpipe.page import words

WIDTH, HEIGHT = 640.0, 320.0
_LEFT, _RIGHT, _BOTTOM = 62.0, 24.0, 44.0  # room for the labels of the axes
_LETTER, _LINE = 6.4, 14.0  # size of a letter of a label
_LONGEST = 36  # letters of a name in the plot; the table has all

_Box = tuple[float, float, float, float]  # left, top, right, bottom


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about count round numbers from low to high, one step beyond neither.

    Steps are 1, 2 or 5 times a power of ten.
    """
    span = high - low
    if not span > 0:
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of an axis: the extremes and a margin, never empty."""
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or abs(high) * 0.05 or 1.0
    return low - margin, high + margin


def scatter(
    marks: Sequence[Mapping[str, Any]], joined: Sequence[int], x_name: str, y_name: str
) -> dict[str, Any]:
    """Return marks, ticks and labels in units of the view box, labels that would overlap left out.

    Args:
        marks: x, y, sd (of y), name and a short one, and whether the mark is on the front.
        joined: the marks on the front, in order of x.
    """
    x_low, x_high = spread([mark["x"] for mark in marks])
    y_low, y_high = spread(without_stragglers([m["y"] + sign * m["sd"] for m in marks for sign in (-1, 1)]))

    def across(x: float) -> float:
        return round(_LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - _LEFT - _RIGHT), 1)

    def up(y: float) -> float:
        return round((HEIGHT - _BOTTOM) * (1 - max(y - y_low, 0.0) / (y_high - y_low)), 1)

    placed = [{**m, "cx": across(m["x"]), "cy": up(m["y"]), "title": _title(m, x_name, y_name),
               "below": m["y"] < y_low,
               "error": (up(m["y"] - m["sd"]), up(m["y"] + m["sd"])) if m["sd"] else None}
              for m in marks]  # fmt: skip
    path = list(stairs([(placed[i]["cx"], placed[i]["cy"]) for i in joined]))
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": _LEFT,
        "floor": HEIGHT - _BOTTOM,
        "marks": placed,
        "line": " ".join(f"{x},{y}" for x, y in path),
        "x_ticks": [(across(x), _tick(x, x_name)) for x in ticks(x_low, x_high)],
        "y_ticks": [(up(y), _tick(y, y_name)) for y in ticks(y_low, y_high)],
        "labels": list(labels([placed[i] for i in joined], obstacles(placed, path))),
        "below": [mark["name"] for mark in placed if mark["below"]],
        "x_name": words.label(x_name.partition(".")[2]),
        "y_name": words.label(y_name.partition(".")[2]),
    }


def _title(mark: Mapping[str, Any], x_name: str, y_name: str) -> str:
    return f"{mark['name']}: {words.quantity(mark['y'], y_name)}, {words.quantity(mark['x'], x_name)}"


def _tick(value: float, name: str) -> str:
    return words.figure(value, name, 5)


def stairs(corners: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Yield the corners of the front: level until the next better point."""
    for i, (x, y) in enumerate(corners):
        if i:
            yield x, corners[i - 1][1]
        yield x, y


def without_stragglers(values: Sequence[float]) -> list[float]:
    """Return the values without those that lie so far below the others that these would be one line."""
    top, median = max(values), statistics.median(values)
    return [value for value in values if value >= top - 4 * (top - median) or median == top]


def obstacles(marks: Sequence[Mapping[str, Any]], path: Sequence[tuple[float, float]]) -> list[_Box]:
    """Return what a name must not cover: marks, and the pieces of the line that joins the front."""
    dots = [(m["cx"] - 5, m["cy"] - 5, m["cx"] + 5, m["cy"] + 5) for m in marks]
    lines = [
        (min(x, u) - 1, min(y, v) - 1, max(x, u) + 1, max(y, v) + 1) for (x, y), (u, v) in pairwise(path)
    ]
    return dots + lines


def labels(wanted: Sequence[Mapping[str, Any]], taken: list[_Box]) -> Iterator[dict[str, Any]]:
    """Yield names beside their marks, each where it covers nothing taken; without such a place, none."""
    for mark in wanted:
        text = mark["short"] if len(mark["short"]) <= _LONGEST else mark["short"][: _LONGEST - 1] + "…"
        width = _LETTER * len(text)
        for dx, dy in (
            (-8 - width, 0),
            (8, 16),
            (-width / 2, -10),
            (-8 - width, 16),
            (8, 4),
            (-width / 2, 20),
        ):
            x, y = mark["cx"] + dx, mark["cy"] + dy
            box = (x, y - _LINE + 3, x + width, y + 3)
            if _fits(box) and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                yield {"x": round(x, 1), "y": round(y, 1), "text": text}
                break


def _fits(box: _Box) -> bool:
    return box[0] >= _LEFT and box[1] >= -6 and box[2] <= WIDTH and box[3] <= HEIGHT - _BOTTOM


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def heat(cells: Sequence[Sequence[tuple[float | None, int]]]) -> list[list[dict[str, Any]]]:
    """Return cells with their strength: how far of the way from the least mean to the largest, percent."""
    means = [mean for row in cells for mean, _ in row if mean is not None]
    low, high = (min(means), max(means)) if means else (0.0, 0.0)
    span = (high - low) or 1.0

    def strength(mean: float | None) -> int | None:
        return None if mean is None else round(100 * (mean - low) / span)

    return [[{"mean": m, "count": n, "strength": strength(m)} for m, n in row] for row in cells]
