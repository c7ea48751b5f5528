"""The page of a sweep: a function of its sweep.json."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from qpipe.errors import RecipeError
from qpipe.page import words
from qpipe.page.plot import heat, scatter
from qpipe.page.render import Row, read_json, refusing, render

FILE, PAGE = "sweep.json", "sweep.html"
_COSTS = ("size_bytes", "latency_ms")
_SLACK = {"percent": (1.0, "point"), "db": (1.0, "dB")}  # what a smaller model may lose and still be named


@dataclass(frozen=True)
class Point:
    """A setting of the sweep: one job, or its seeds together.

    Args:
        figures: by 'variant.metric'.
        spreads: standard deviation over seeds, by the same.
        jobs: the rows of sweep.json it stands for.
    """

    overrides: Mapping[str, Any]
    figures: Mapping[str, float]
    spreads: Mapping[str, float]
    jobs: Sequence[Row]

    @property
    def name(self) -> str:
        """Return the words that tell it from the others."""
        return " ".join(f"{key}={value}" for key, value in self.overrides.items()) or "the one job"

    def value(self, column: str | None) -> float | None:
        """Return a finite figure, or None."""
        found = self.figures.get(column or "")
        return found if found is not None and math.isfinite(found) else None


def write_sweep_page(folder: Path) -> Path:
    """Write sweep.html from the sweep.json of a folder.

    Raises:
        RecipeError: there is none, or it is another program's.
    """
    sweep = read_json(folder / FILE)
    if sweep.get("format") != "qpipe-sweep":
        raise RecipeError(f"{folder / FILE} is no sweep of qpipe")
    with refusing(folder / FILE):
        html = sweep_page(sweep)
    page = folder / PAGE
    page.write_text(html, encoding="utf-8")
    return page


def sweep_page(sweep: Row) -> str:
    """Return the page of a sweep as HTML."""
    points = list(_points(sweep))
    columns = _columns(points)
    judged = [c for c in sweep.get("judged", ()) if c in columns and not words.is_cost(c)]
    quality = judged[0] if judged else _quality(points, columns)
    costs = [c for c in (_cost(quality, cost, columns) for cost in _COSTS) if quality and c]
    axes = _axes(sweep, points)
    effects = sorted(_effects(points, axes, quality), key=lambda effect: -effect["span"])
    jobs = sweep["jobs"]
    return render(
        "sweep.html",
        script="sort.js",
        title=f"{len(jobs)} jobs" if len(jobs) != 1 else "One job",
        status=sweep["status"],
        command=sweep["command"],
        axes=axes,
        fixed=_fixed(sweep),
        quality=quality,
        findings=[
            *sweep.get("findings", ()),
            *_findings(points, quality, costs),
            *_strongest(effects, quality),
        ],
        fronts=[front for cost in costs if (front := _front_plot(points, quality, cost))],
        undrawn=[p.name for p in points if quality and p.value(quality) is None],
        effects=effects,
        heats=_heats(points, [effect["axis"] for effect in effects], quality),
        columns=_shown(points, columns),
        points=points,
        seeded=any(len(point.jobs) > 1 for point in points),
        bad=[job for job in jobs if job["status"] not in ("finished", "pending")],
        pending=[job for job in jobs if job["status"] == "pending"],
    )


def _fixed(sweep: Row) -> str:
    """Return the words of the command that are the same in all jobs: what was quantized, on which data."""
    own = (*sweep["axes"], "out")
    fixed = [word for word in shlex.split(sweep["command"]) if word.partition("=")[0] not in own]
    return shlex.join(word for word in fixed if "=" in word)


def _points(sweep: Row) -> Iterator[Point]:
    """Yield settings that have figures, seeds joined."""
    jobs = {job["index"]: job for job in sweep["jobs"]}
    for row in sweep.get("aggregated") or ():
        flat = {f"{v}.{m}": spread for v, metrics in row["metrics"].items() for m, spread in metrics.items()}
        means = {name: _number(spread["mean"]) for name, spread in flat.items()}
        spreads = {name: _number(spread["sd"]) for name, spread in flat.items()}
        yield Point(row["overrides"], means, spreads, [jobs.pop(index) for index in row["jobs"]])
    for job in jobs.values():
        if job["metrics"]:
            flat = {
                f"{v}.{m}": _number(x) for v, metrics in job["metrics"].items() for m, x in metrics.items()
            }
            yield Point(job["overrides"], flat, {}, [job])


def _number(value: Any) -> float:  # noqa: ANN401
    return math.nan if (found := words.number(value)) is None else found


def _axes(sweep: Row, points: Sequence[Point]) -> dict[str, list[Any]]:
    """Return the values of each word that varies among points."""
    names = [axis for axis in sweep["axes"] if any(axis in point.overrides for point in points)]
    found = {axis: list(dict.fromkeys(str(p.overrides.get(axis)) for p in points)) for axis in names}
    return {axis: values for axis, values in found.items() if len(values) > 1}


def _columns(points: Sequence[Point]) -> list[str]:
    return list(dict.fromkeys(column for point in points for column in point.figures))


def _varies(points: Sequence[Point], column: str | None) -> bool:
    return len({point.value(column) for point in points} - {None}) > 1


def _shown(points: Sequence[Point], columns: Sequence[str]) -> list[str]:
    """Return the columns of the table: those that vary; the float model's times vary by chance alone."""
    own = [c for c in columns if not (c.startswith("fp32.") and words.unit(c) == "ms")]
    return [c for c in own if _varies(points, c)] or own


def _quality(points: Sequence[Point], columns: Sequence[str]) -> str | None:
    """Return the figure settings are judged by: of an executed file where all have one, else simulated.

    The first that the float model has and that varies, else the first that varies.
    """
    candidates = [
        column
        for column in columns
        if not column.startswith("fp32.") and not words.is_cost(column) and _usable(points, column)
    ]
    executed = [c for c in candidates if not c.startswith("simulated.")] or candidates
    own = [c for c in executed if f"fp32.{c.partition('.')[2]}" in columns]
    return next((c for c in [*own, *executed] if _varies(points, c)), next(iter([*own, *executed]), None))


def _usable(points: Sequence[Point], column: str) -> bool:
    return all(column in point.figures for point in points)


def _cost(quality: str | None, cost: str, columns: Sequence[str]) -> str | None:
    """Return the column of a cost, of the variant that is judged if it has one."""
    if quality is None:
        return None
    own = f"{quality.partition('.')[0]}.{cost}"
    others = [c for c in columns if c.endswith(f".{cost}") and not c.startswith("fp32.")]
    return own if own in columns else next(iter(others), None)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return which of (cost, quality) no other beats in one and matches in the other, cheapest first."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    best, kept = -math.inf, []
    for i in order:
        if points[i][1] > best:
            best = points[i][1]
            kept.append(i)
    return kept


def _drawn(points: Sequence[Point], quality: str | None, cost: str) -> list[tuple[Point, float, float]]:
    found = ((point, point.value(cost), point.value(quality)) for point in points)
    return [(point, x, y) for point, x, y in found if x is not None and y is not None]


def _front_plot(points: Sequence[Point], quality: str | None, cost: str) -> dict[str, Any] | None:
    """Return the plot of quality against a cost, the Pareto front joined and named."""
    drawn = _drawn(points, quality, cost)
    if len(drawn) < 2 or not _varies(points, cost):
        return None
    on_front = front([(x, y) for _, x, y in drawn])
    marks = [_mark(point, x, y, quality, i in on_front) for i, (point, x, y) in enumerate(drawn)]
    plot = scatter(marks, on_front, cost, quality or "")
    rows = [drawn[i] for i in on_front]
    return {**plot, "heading": _heading(cost), "rows": rows, "cost": cost}


def _mark(point: Point, x: float, y: float, quality: str | None, on_front: bool) -> dict[str, Any]:
    spread = point.spreads.get(quality or "", 0.0)
    short = ", ".join(str(value) for value in point.overrides.values())
    return {"x": x, "y": y, "sd": spread, "name": point.name, "short": short, "on": on_front}


def _heading(column: str) -> str:
    variant, _, metric = column.partition(".")
    return f"{words.label(metric).partition(',')[0]} ({variant})"


def _effects(points: Sequence[Point], axes: Row, quality: str | None) -> Iterator[dict[str, Any]]:
    """Yield each axis with the mean of the quality at each of its values, all else averaged."""
    for axis, values in axes.items():
        means = [_mean(points, quality, {axis: value}) for value in values]
        finite = [mean for mean, _ in means if mean is not None]
        if not finite:
            continue
        low, high = min(finite), max(finite)
        rows = [
            {"value": value, "mean": mean, "count": count,
             "place": 100 * (mean - low) / (high - low) if mean is not None and high > low else 0.0}
            for value, (mean, count) in zip(values, means, strict=True)
        ]  # fmt: skip
        yield {"axis": axis, "rows": rows, "span": high - low, "low": low, "high": high}


def _mean(points: Sequence[Point], quality: str | None, chosen: Row) -> tuple[float | None, int]:
    """Return the mean of the quality over the points that have chosen values, and how many there are."""
    found = [
        value
        for point in points
        if all(str(point.overrides.get(axis)) == wanted for axis, wanted in chosen.items())
        and (value := point.value(quality)) is not None
    ]
    return (sum(found) / len(found) if found else None), len(found)


def _heats(points: Sequence[Point], axes: Sequence[str], quality: str | None) -> list[dict[str, Any]]:
    """Return a heat map for each pair of axes, the strongest first."""
    values = {axis: list(dict.fromkeys(str(p.overrides.get(axis)) for p in points)) for axis in axes}
    maps = []
    for across, down in combinations(axes, 2):
        cells = [[_mean(points, quality, {across: x, down: y}) for x in values[across]] for y in values[down]]
        maps.append({"across": across, "down": down, "columns": values[across],
                     "rows": list(zip(values[down], heat(cells), strict=True))})  # fmt: skip
    return maps


def _findings(points: Sequence[Point], quality: str | None, costs: Sequence[str]) -> Iterator[str]:
    """Say which setting is best, and which cheaper one is nearly as good."""
    judged = [(point, value) for point in points if (value := point.value(quality)) is not None]
    if not judged or quality is None:
        return
    best, top = max(judged, key=lambda pair: (pair[1], -(pair[0].value(costs[0]) or 0) if costs else 0))
    metric = quality.partition(".")[2]
    ties = sum(value == top for _, value in judged)
    also = f", as have {words.counted(ties - 1, 'other setting')}" if ties > 1 else ""
    yield f"The best {_heading(quality)} is {words.quantity(top, metric)}, with {best.name}{also}."
    slack, unit = _SLACK.get(words.unit(metric), (abs(top) / 100, ""))
    for cost in costs:
        near = [(p, x) for p, y in judged if y >= top - slack and (x := p.value(cost)) is not None]
        if not near or not _varies(points, cost):
            continue
        cheap, x = min(near, key=lambda pair: (pair[1], -(pair[0].value(quality) or 0)))
        within = f"within {slack:g} {unit} of it" if unit else "within 1 % of it"
        yield (
            f"Least {_heading(cost)} {within}: {words.quantity(x, cost)} with {cheap.name} "
            f"({words.quantity(cheap.value(quality), metric)})."
        )


def _strongest(effects: Sequence[Row], quality: str | None) -> Iterator[str]:
    """Say which axis matters most."""
    if not effects or not effects[0]["span"] or quality is None:
        return
    first, metric = effects[0], quality.partition(".")[2]
    rows = [row for row in first["rows"] if row["mean"] is not None]
    worst, best = min(rows, key=_by_mean), max(rows, key=_by_mean)
    yield (
        f"What matters most is {first['axis']}: on average {worst['value']} gives "
        f"{words.quantity(worst['mean'], metric)}, {best['value']} {words.quantity(best['mean'], metric)}."
    )


def _by_mean(row: Row) -> float:
    return float(row["mean"])
