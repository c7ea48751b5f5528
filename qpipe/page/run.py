"""The page of one run: a function of its report.json and config.yaml."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qpipe.errors import RecipeError
from qpipe.page import words
from qpipe.page.histogram import drawing
from qpipe.page.render import Row, read_config, read_json, refusing, render, write_csv

PAGE, DATA = "report.html", "csv"
SHOWN = 12  # rows of a table before the rest is folded


def write_page(folder: Path, known_as: Path | None = None) -> Path:
    """Write report.html and csv/ from the report.json and config.yaml of a run's folder.

    Args:
        known_as: where the folder will stand; None: where it is.

    Raises:
        RecipeError: the folder holds no report.
    """
    report, config = read_report(folder), read_config(folder)
    with refusing(folder / "report.json"):
        html = run_page(report, config, known_as or folder)
        (folder / DATA).mkdir(exist_ok=True)
        for name, rows in tables(report):
            write_csv(folder / DATA / f"{name}.csv", rows)
    page = folder / PAGE
    page.write_text(html, encoding="utf-8")
    return page


def read_report(folder: Path) -> dict[str, Any]:
    """Return the report of a run's folder.

    Raises:
        RecipeError: there is none, or it is another program's.
    """
    report = read_json(folder / "report.json")
    shape = {"metrics": Mapping, "edges": list, "weights": list}
    wrong = [key for key, kind in shape.items() if not isinstance(report.get(key), kind)]
    if wrong:
        raise RecipeError(f"{folder / 'report.json'} has no {', '.join(wrong)}; it is no report of qpipe")
    return report


def run_page(report: Row, config: Row, folder: Path) -> str:
    """Return the page of a run as HTML."""
    found = report.get("tables") or {}
    return render(
        "run.html",
        title=words.title(config),
        story=words.story(report, config),
        figures=_figures(report["metrics"], words.speeds(report)),
        findings=[text for text in (_said(table, "finding") for table in found.values()) if text],
        sections=[_section(name, table) for name, table in found.items()],
        edges=report["edges"],
        weights=report["weights"],
        skipped=report.get("skipped") or {},
        notices=[*(report.get("notices") or []), *_reused(report)],
        artifacts=report.get("artifacts") or [],
        environment=report.get("environment") or {},
        repeat=repeat(folder),
        folder=folder.name,
    )


def _reused(report: Row) -> list[str]:
    return [f"Not computed but taken from an earlier run: {what}" for what in report.get("reused") or ()]


def repeat(folder: Path) -> str:
    """Return the command that does a run again, into a folder of its own."""
    near = Path(os.path.relpath(folder)) if folder.is_relative_to(Path.cwd()) else folder
    return "python -m qpipe " + shlex.join(["--config", str(near / "config.yaml"), f"out={near}-again"])


def tables(report: Row) -> Iterator[tuple[str, Sequence[Row]]]:
    """Yield everything in a report that has rows, by a name fit for a file."""
    yield "figures", [{"variant": variant, **metrics} for variant, metrics in report["metrics"].items()]
    yield "edges", report["edges"]
    yield "weights", report["weights"]
    for name, table in (report.get("tables") or {}).items():
        for key, rows in _rows(table).items():
            yield re.sub(r"[^\w.-]", "_", f"{name}.{key}"), rows


def _rows(table: Any) -> dict[str, list[Row]]:  # noqa: ANN401  # of an evaluator
    """Return the lists of rows in what an evaluator tabled."""
    if not isinstance(table, Mapping):
        return {}
    return {
        key: rows
        for key, rows in table.items()
        if isinstance(rows, list) and rows and all(isinstance(row, Mapping) for row in rows)
    }


def _figures(metrics: Row, speeds: Mapping[str, str]) -> dict[str, Any]:
    """Lay metrics out by name, a column for each variant, with the distance from the float model."""
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    base = metrics.get("fp32", {})
    rows = [
        {
            "name": name,
            "cells": [
                {
                    "value": values.get(name),
                    "change": ""
                    if variant == "fp32"
                    else words.moved(name, values, base, speeds.get(variant)),
                }
                for variant, values in metrics.items()
            ],
        }
        for name in names
    ]
    return {"variants": list(metrics), "rows": rows}


def _said(table: Any, key: str) -> str:  # noqa: ANN401
    """Return what an evaluator says about its tables."""
    return str(table.get(key, "")) if isinstance(table, Mapping) else ""


_OWN = ("title", "about", "finding", "print")  # what a table says of itself


def _section(name: str, table: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return one evaluator's tables: rows with counts are histograms, others a table."""
    variant, _, evaluator = name.partition(".")
    rest = {key: table[key] for key in table if key not in (*_rows(table), *_OWN)}
    return {
        "title": _said(table, "title") or evaluator.replace("_", " ").capitalize(),
        "variant": variant,
        "about": _said(table, "about"),
        "parts": [_part(key, rows) for key, rows in _rows(table).items()],
        "rest": rest,
    }


def _part(key: str, rows: Sequence[Row]) -> dict[str, Any]:
    if all("counts" in row for row in rows):
        return {"key": key, "histograms": [drawing(row) for row in rows]}
    columns = list(dict.fromkeys(column for row in rows for column in row))
    numeric = [c for c in columns if any(words.number(row.get(c)) is not None for row in rows)]
    barred = _barred(rows, numeric)
    bars = _bars([words.number(row.get(barred)) for row in rows]) if barred else []
    return {
        "key": key,
        "histograms": [],
        "columns": columns,
        "numeric": numeric,
        "barred": barred,
        "rows": [(row, bars[i] if bars else 0) for i, row in enumerate(rows)],
        "shown": SHOWN,
    }


def _barred(rows: Sequence[Row], columns: Sequence[str]) -> str | None:
    """Return the first column with a unit in which rows differ: it is drawn as bars."""
    with_unit = (column for column in columns if words.unit(column))
    return next((c for c in with_unit if len({str(row.get(c)) for row in rows}) > 1), None)


def _bars(values: Sequence[float | None]) -> list[float]:
    """Return the length of each value's bar in percent of the longest; infinity has the whole length."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    longest = max([*finite, 0.0]) or 1.0
    return [100.0 if value == math.inf else 100 * max(value or 0.0, 0.0) / longest
            if value is not None and value == value else 0.0 for value in values]  # fmt: skip
