"""A comparison as text and as a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qpipe.page import words
from qpipe.page.render import Row, render


def comparison_page(comparison: Row) -> str:
    """Return a comparison as HTML."""
    return render("compare.html", c=comparison, metrics=[_metric(row) for row in comparison["metrics"]])


def text_rows(comparison: Mapping[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """Return a comparison as titled tables of text."""
    plain = words.figure
    config = [[str(row["key"]), str(row["a"]), str(row["b"])] for row in comparison["config"]]
    metrics = [
        [row["metric"], row["variant"], plain(row["a"], row["metric"]), plain(row["b"], row["metric"]),
         row["difference"], row["interval"]]
        for row in map(_metric, comparison["metrics"])
    ]  # fmt: skip
    head = ["", "A", "B", "B - A"]
    tables = [(name, [head, *map(_changed, rows[:10])]) for name, rows in comparison["tables"].items()]
    level = f"{comparison['interval']['level']:.0%} interval"
    return [
        ("chosen otherwise", [["", "A", "B"], *config] if config else []),
        ("figures", [["", "", "A", "B", "B - A", level], *metrics]),
        *tables,
    ]


def _changed(row: Row) -> list[str]:
    return [row["name"], words.figure(row["a"]), words.figure(row["b"]), _signed(row["difference"])]


def _metric(row: Row) -> dict[str, Any]:
    known = row["low"] is not None
    interval = f"{_signed(row['low'])} to {_signed(row['high'])}, {row['samples']} samples" if known else ""
    sure = known and not row["low"] <= 0 <= row["high"]
    return {**row, "difference": _moved(row), "interval": interval, "sure": sure}


def _moved(row: Row) -> str:
    if words.is_cost(row["metric"]):
        return words.change(row["metric"], row["b"], row["a"])
    return _signed(row["difference"])


def _signed(value: Any) -> str:  # noqa: ANN401
    found = words.number(value)
    return "" if found is None else ("+" if found > 0 else "") + words.figure(found, digits=3)
