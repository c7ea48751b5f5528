"""Two runs beside each other: what was chosen otherwise, what came out otherwise, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qpipe.errors import RecipeError
from qpipe.page.render import read_config
from qpipe.page.run import read_report, tables
from qpipe.page.words import number, unit
from qpipe.record import SAMPLES

LEVEL = 0.95
_CHUNK = 1 << 22  # values resampled at a time
_PLACE = ("out", "plan", "tracker", "explicit", "fail_fast")  # says nothing about the result
_Row = dict[str, Any]


def compare(a: Path, b: Path, resamples: int = 2000, seed: int = 0) -> _Row:
    """Return what tells two runs' folders apart as plain data; differences are B less A.

    Raises:
        RecipeError: a folder holds no run.
    """
    reports, configs = (read_report(a), read_report(b)), (read_config(a), read_config(b))
    warnings = list(_warnings(*reports, *configs))
    samples = _samples(a), _samples(b)
    return {
        "a": str(a),
        "b": str(b),
        "warnings": warnings,
        "config": list(_config(*configs)),
        "metrics": list(_metrics(*reports, *samples, resamples, seed)),
        "tables": {name: rows for name, rows in _tables(*reports) if rows},
        "interval": {"level": LEVEL, "resamples": resamples, "seed": seed},
    }


def paired_interval(
    a: Tensor, b: Tensor, decibels: bool = False, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the bootstrap interval of a difference, the same samples drawn for both (percentiles).

    Args:
        a, b: [N], of which means are compared; or [N, 2], of which ratios of sums are.
        decibels: ten times the logarithm of the ratios.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, ch. 13.
    """
    generator = torch.Generator().manual_seed(seed)
    count, found = len(a), []
    both = torch.stack([a.double(), b.double()])
    for start in range(0, resamples, rows := max(1, _CHUNK // count)):
        drawn = torch.randint(count, (min(rows, resamples - start), count), generator=generator)
        found.append(_statistic(both[1][drawn], decibels) - _statistic(both[0][drawn], decibels))
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(torch.cat(found), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def _statistic(values: Tensor, decibels: bool) -> Tensor:
    """Return the mean of [R, N], or the ratio of sums of [R, N, 2], for each of R draws."""
    if values.dim() == 2:
        return values.mean(1)
    sums = values.sum(1)
    ratio = sums[:, 0] / sums[:, 1]
    return 10 * torch.log10(ratio) if decibels else ratio


def _metrics(
    a: _Row, b: _Row, of_a: Mapping[str, Tensor], of_b: Mapping[str, Tensor], resamples: int, seed: int
) -> Iterator[_Row]:
    """Yield each figure that either run has, with an interval where both kept it sample by sample."""
    for variant in dict.fromkeys([*a["metrics"], *b["metrics"]]):
        first, second = a["metrics"].get(variant, {}), b["metrics"].get(variant, {})
        for name in dict.fromkeys([*first, *second]):
            row = {"variant": variant, "metric": name, "a": first.get(name), "b": second.get(name)}
            row |= {"difference": _difference(row["a"], row["b"]), "low": None, "high": None, "samples": None}
            x, y = of_a.get(f"{variant}.{name}"), of_b.get(f"{variant}.{name}")
            if x is not None and y is not None and x.shape == y.shape and len(x):
                row["samples"] = len(x)
                row["low"], row["high"] = paired_interval(x, y, unit(name) == "db", resamples, seed)
            yield row


def _difference(a: Any, b: Any) -> float | None:  # noqa: ANN401  # of JSON
    x, y = number(a), number(b)
    return None if x is None or y is None or not math.isfinite(y - x) else y - x


def _config(a: _Row, b: _Row) -> Iterator[_Row]:
    """Yield each key whose value differs."""
    first, second = dict(_flat(a)), dict(_flat(b))
    for key in dict.fromkeys([*first, *second]):
        if key.partition(".")[0] not in _PLACE and first.get(key) != second.get(key):
            yield {"key": key, "a": first.get(key), "b": second.get(key)}


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _tables(a: _Row, b: _Row) -> Iterator[tuple[str, list[_Row]]]:
    """Yield, of each table whose rows are named, its first column with a unit, largest change first."""
    first, second = dict(_named(a)), dict(_named(b))
    for table in (table for table in first if table in second):
        rows, theirs = first[table], second[table]
        column = next((c for row in rows.values() for c in row if unit(c)), None)
        if column is not None:
            pairs = {
                name: (rows[name].get(column), theirs[name].get(column)) for name in rows if name in theirs
            }
            found = [
                {"name": n, "a": x, "b": y, "difference": _difference(x, y)} for n, (x, y) in pairs.items()
            ]
            yield f"{table}, {column}", sorted(found, key=_change)


def _change(row: _Row) -> float:
    return -abs(float(row["difference"] or 0.0))


def _named(report: _Row) -> Iterator[tuple[str, dict[str, _Row]]]:
    """Yield each table of a report as rows by the text they begin with."""
    for table, rows in tables(report):
        named = {
            str(name): dict(row) for row in rows if isinstance(name := next(iter(row.values()), None), str)
        }
        if "." in table:  # an evaluator's
            yield table, named


def _warnings(a: _Row, b: _Row, config_a: _Row, config_b: _Row) -> Iterator[str]:
    """Say what keeps figures from being compared."""
    for kind, thing in (("edges", "activation"), ("weights", "weight")):
        yield from _differing(kind, thing, a[kind], b[kind])
    for key in ("data", "model"):
        if _comparable(config_a.get(key)) != _comparable(config_b.get(key)):
            yield f"the runs have different {key}: figures of samples are of different things"
    here, there = a.get("environment") or {}, b.get("environment") or {}
    for key, what in (("cpu", "processors"), ("threads", "numbers of threads"), ("devices", "devices")):
        if here.get(key) != there.get(key):
            yield f"the runs were timed on different {what}: {here.get(key)} and {there.get(key)}"


def _comparable(config: Any) -> Any:  # noqa: ANN401
    """Leave out how many samples calibrate: the evaluation set stays what it is."""
    return {k: v for k, v in config.items() if k != "calibration"} if isinstance(config, Mapping) else config


def _differing(kind: str, thing: str, a: Sequence[_Row], b: Sequence[_Row]) -> Iterator[str]:
    """Say which tensors only one run quantizes: two figures mean little without the same ones."""
    first, second = {row["name"] for row in a}, {row["name"] for row in b}
    for only, run in ((first - second, "A"), (second - first, "B")):
        if only:
            names = ", ".join(sorted(only)[:5]) + (", …" if len(only) > 5 else "")
            yield f"only {run} quantizes {len(only)} {thing}{'' if len(only) == 1 else 's'}: {names}"


def _samples(folder: Path) -> dict[str, Tensor]:
    file = folder / SAMPLES
    try:
        return dict(load_file(file)) if file.is_file() else {}
    except SafetensorError as error:
        raise RecipeError(f"{file} is damaged ({error}); take it away, or repeat the run") from None
