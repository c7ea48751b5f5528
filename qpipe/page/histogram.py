"""A histogram as a drawing: bars, the clipping range, the levels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qpipe.page import words

WIDTH, HEIGHT = 320.0, 96.0
_MOST_LEVELS = 40  # beyond, their lines would be one grey


def drawing(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the template draws of one tensor, in units of its view box.

    Args:
        row: low and high of the bins, counts; optionally clip_low, clip_high, levels and what _caption names.
    """
    low, high = float(row["low"]), float(row["high"])
    span = (high - low) or 1.0

    def place(x: float) -> float:
        return round(min(max((float(x) - low) / span, 0.0), 1.0) * WIDTH, 2)

    counts = [float(count) for count in row["counts"]]
    tallest = math.log1p(max([*counts, 0.0])) or 1.0
    width = WIDTH / max(len(counts), 1)
    bars = [
        {
            "x": round(i * width, 2),
            "width": round(width * 0.92, 2),
            "height": round(HEIGHT * math.log1p(n) / tallest, 2),
        }
        for i, n in enumerate(counts)
        if n > 0
    ]
    levels = row.get("levels") or []
    return {
        "row": row,
        "caption": _caption(row),
        "width": WIDTH,
        "height": HEIGHT,
        "bars": bars,
        "clip": [place(row[key]) for key in ("clip_low", "clip_high") if row.get(key) is not None],
        "levels": [place(x) for x in levels] if len(levels) <= _MOST_LEVELS else [],
        "zero": place(0.0) if low < 0 < high else None,
    }


def _caption(row: Mapping[str, Any]) -> str:
    parts = [
        words.quantity(row[key], key) + after
        for key, after in (("sqnr_db", ""), ("clipped_percent", " clipped"), ("num_levels", " levels used"))
        if row.get(key) is not None
    ]
    return "; ".join([*parts, *([f"in units of {row['unit']}"] if row.get("unit") else [])])
