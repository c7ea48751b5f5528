"""Figures and choices in words: units, changes, sentences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

UNITS = {"percent": "%", "db": "dB", "ms": "ms", "bytes": "B"}
_COSTS = ("ms", "bytes")
_PREFIXES = ("", "k", "M", "G", "T")
_Config = Mapping[str, Any]


def unit(name: str) -> str:
    """Return the unit that a metric's name carries as its last word, '' if none."""
    last = name.rpartition("_")[2]
    return last if last in UNITS else ""


def label(name: str) -> str:
    """Return a metric's name for a heading: 'latency_p95_ms' -> 'latency p95, ms'."""
    ending = unit(name)
    words = name.removesuffix(ending).replace("_", " ").strip() or name
    return f"{words}, {UNITS[ending]}" if ending and ending != "bytes" else words


def is_cost(name: str) -> bool:
    """Whether a metric is what a result costs: a size or a time."""
    return unit(name) in _COSTS


def number(value: Any) -> float | None:  # noqa: ANN401  # of a JSON file
    """Return a figure as a number ('inf' and 'nan' are text in JSON); None where it is none."""
    if isinstance(value, str) and value not in ("inf", "-inf", "nan"):
        return None
    return None if value is None or isinstance(value, (bool, Mapping, list)) else float(value)


def figure(value: Any, name: str = "", digits: int = 4) -> str:  # noqa: ANN401
    """Return a figure as text, bytes with a prefix; what is no number as it stands."""
    if (found := number(value)) is None:
        return _text(value)
    if not math.isfinite(found):
        return {math.inf: "∞", -math.inf: "-∞"}.get(found, "not a number")
    return _bytes(found) if unit(name) == "bytes" else _plain(found, digits)


def _text(value: Any) -> str:  # noqa: ANN401
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {figure(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(figure(item) for item in value)
    return {None: "-", True: "yes", False: "no"}.get(value) or str(value)


def _plain(value: float, digits: int) -> str:
    magnitude = abs(value)
    if magnitude and not 1e-3 <= magnitude < 1e6:
        return f"{value:.{digits - 2}e}"
    decimals = max(0, digits - 1 - math.floor(math.log10(magnitude))) if magnitude else 0
    text = f"{value:,.{min(decimals, 4)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _bytes(value: float) -> str:
    power = min(int(math.log10(max(abs(value), 1)) // 3), len(_PREFIXES) - 1)
    return f"{_plain(value / 1000**power, 3)} {_PREFIXES[power]}B"


def change(name: str, value: Any, base: Any) -> str:  # noqa: ANN401
    """Say how far a figure is from its base: a factor for sizes and times, a difference otherwise."""
    now, before = number(value), number(base)
    if now is None or before is None or not math.isfinite(now - before):
        return ""
    if not is_cost(name):
        return f"{'+' if now > before else ''}{_plain(now - before, 3)}" if now != before else "same"
    if not now or not before:
        return ""
    more, less = ("slower", "faster") if unit(name) == "ms" else ("larger", "smaller")
    ratio = max(now / before, before / now)
    return f"{_plain(ratio, 3)}x {less if now < before else more}" if ratio >= 1.005 else "same"


def speeds(report: Mapping[str, Any]) -> dict[str, str]:
    """Say for each exported file how fast it is beside the float model in the same engine."""
    proofs = {row.get("exporter"): row.get("proof") or {} for row in report.get("artifacts") or []}
    ratios = {
        name: change("latency_ms", proof.get("latency_ms"), proof.get("fp32_latency_ms"))
        for name, proof in proofs.items()
    }
    return {name: ratio for name, ratio in ratios.items() if ratio}


def moved(name: str, values: Mapping[str, Any], base: Mapping[str, Any], speed: str | None = None) -> str:
    """Say how far a variant's figure is from the float model's; a speed that an engine measured goes first.

    The float model's own latency is torch's: beside another engine's it would compare engines.
    """
    if speed and unit(name) == "ms":
        return speed if name == "latency_ms" else ""
    return change(name, values.get(name), base.get(name))


def listed(words: Iterable[str]) -> str:
    """Join words: 'a, b and c'."""
    items = list(words)
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def counted(count: int, thing: str) -> str:
    """Return '1 edge', '2 edges'."""
    return f"{count:,} {thing}" + ("" if count == 1 else "s")


def by_slot(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the names of tensors by how they are quantized, in words."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        rule = f", {row['calibrator']} ranges" if row.get("calibrator") else ""
        form = "symmetric" if row.get("symmetric") else "asymmetric"
        when = ", dynamic" if row.get("dynamic") else ""
        how = (
            f"{counted(row['num_bits'], 'bit')} ({row['quantizer']} {form}{rule}{when}, "
            f"a scale for each {row['granularity']})"
        )
        groups.setdefault(how, []).append(str(row["name"]))
    return groups


def story(report: Mapping[str, Any], config: _Config) -> str:
    """Say in one paragraph what was done."""
    sentences = [
        _subject(report, config),
        _slots("weight", report["weights"]),
        _slots("activation", report["edges"]),
        _before_and_after(config),
        _kept(report),
        _outcome(report["metrics"], speeds(report)),
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def _subject(report: Mapping[str, Any], config: _Config) -> str:
    name = title(config)
    target = (config.get("target") or {}).get("name")
    where = f" for target {target}" if target else ""
    samples = ((config.get("data") or {}).get("calibration") or {}).get("num_samples")
    static = any(not row.get("dynamic") for row in report["edges"])
    ranged = f", its activation ranges taken from {counted(samples, 'sample')}" if samples and static else ""
    return f"{name} was quantized{where}{ranged}."


def title(config: _Config) -> str:
    """Return what the model and its data are called."""
    names = [
        str(config[key]["_target_"]).rpartition(".")[2]
        for key in ("model", "data")
        if isinstance(config.get(key), Mapping) and config[key].get("_target_")
    ]
    return " on ".join(names) or "A model"


def _slots(thing: str, rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return f"{thing.capitalize()}s stay in floating point."
    groups = by_slot(rows)
    return listed(f"{counted(len(names), thing)} got {how}" for how, names in groups.items()) + "."


def _before_and_after(config: _Config) -> str:
    parts = [
        f"{listed(config[kind])} {when}"
        for kind, when in (("transform", "beforehand"), ("finetune", "afterwards"))
        if config.get(kind)
    ]
    return f"It ran {listed(parts)}." if parts else ""


def _kept(report: Mapping[str, Any]) -> str:
    skipped = report.get("skipped") or {}
    return f"{counted(len(skipped), 'tensor')} stayed in floating point." if skipped else ""


def _outcome(metrics: Mapping[str, Mapping[str, Any]], engines: Mapping[str, str]) -> str:
    """Compare the last variant, the executed file if there is one, with the float model."""
    variants = [name for name in metrics if name != "fp32"]
    if not variants or "fp32" not in metrics:
        return ""
    last, base = variants[-1], metrics["fp32"]
    parts = []
    for name, value in metrics[last].items():
        how = moved(name, metrics[last], base, engines.get(last))
        if "p95" in name or not how:
            continue
        heading = label(name).partition(",")[0]
        beside = f" instead of {quantity(base[name], name)}"
        if unit(name) == "ms" and last in engines:
            beside, how = "", f"{how}, beside fp32 in that engine"
        parts.append(f"{heading} {quantity(value, name)}{beside} ({how})")
    how = "simulated" if last == "simulated" else f"executed as {last}"
    outcome = f"The result, {how}, has {listed(parts)}." if parts else ""
    return " ".join(filter(None, (outcome, _resemblance(metrics[last], base))))


def _resemblance(metrics: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """Say what only a comparison with the float model's outputs has."""
    own = [
        f"{label(name).partition(',')[0]} {quantity(metrics[name], name)}"
        for name in metrics
        if name not in base
    ]
    return f"Beside the float model's outputs: {listed(own)}." if own else ""


def quantity(value: Any, name: str) -> str:  # noqa: ANN401
    """Return a figure with its unit."""
    ending = unit(name)
    return figure(value, name) + (f" {UNITS[ending]}" if ending and ending != "bytes" else "")
