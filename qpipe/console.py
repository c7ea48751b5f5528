"""What a run prints: tables on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import os
import select
import shlex
import shutil
import signal
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpipe.groups import SEVERAL

if TYPE_CHECKING:
    from qpipe.sweep import Row
    from qpipe.types import Report


_KINDS = ("quantizer", "calibrator", "granularity")
_NAMED = 8  # of many edges; the page has all
_Config = Mapping[str, Any]


def is_rank_zero() -> bool:
    """Whether this process is the one that writes, tracks and prints."""
    ranks = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return int(next((rank for rank in ranks if rank), "0")) == 0


def while_read(command: Callable[[], int]) -> int:
    """Return a command's exit code; where nobody reads its output any more, end quietly."""
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        unread = [stream for stream in (sys.stdout, sys.stderr) if _is_unread(stream.fileno())]
        if not unread:
            raise
        for stream in unread:  # or Python complains when it flushes them at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 128 + signal.SIGPIPE


def _is_unread(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def set_up_logs() -> None:
    """Say in plain lines what takes time and how much is left; keep Lightning's advice out."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("qpipe: %(message)s"))
    ours = logging.getLogger("qpipe")
    ours.handlers = [handler]
    ours.setLevel(logging.INFO if is_rank_zero() else logging.WARNING)
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric|torch.utils.data")


def error(message: object) -> None:
    """Print one sentence to stderr."""
    if is_rank_zero():
        print(f"qpipe: {message}", file=sys.stderr)


def notice(message: object) -> None:
    """Print what a user should know to stderr."""
    error(f"note: {message}")


def header(config: _Config) -> None:
    """Name what was chosen."""
    rows = [
        (name, config[name]["_target_"].rpartition(".")[2]) for name in ("model", "data") if name in config
    ]
    rows += [("target", config["target"]["name"])]
    rows += [(role, _slot(config, config[role])) for role in ("weight", "activation")]
    rows += [(kind, ", ".join(config[kind]) or "none") for kind in SEVERAL if config.get(kind)]
    _table(None, rows)


def summary(report: Report, where: str | None = None, brief: bool = False) -> None:
    """Print edges, notices and the figures of every variant, and where the run is.

    Args:
        where: the tracker's word for it.
        brief: leave the edges out, as one of many runs.
    """
    if not brief:
        edges(report)
    for table in report.tables.values():
        for key in table.get("print", ()):
            _told(table[key])
    for message in report.notices:
        notice(message)
    if report.reused:
        notice(f"reused: {', '.join(report.reused)}; cache=false computes everything")
    variants = list(report.metrics)
    names = list(dict.fromkeys(name for metrics in report.metrics.values() for name in metrics))
    figures = [(name, *(_figure(report.metrics[v].get(name)) for v in variants)) for name in names]
    if figures:
        _table(("", *variants), figures)
    for artifact in report.artifacts:
        _line(f"{artifact.exporter}: {artifact.path} ({artifact.num_bytes:,} bytes, {artifact.engine})")
    if report.folder is not None:
        _line(f"run folder: {report.folder} (look at report.html)")
    if where:
        _line(where)


def edges(report: Report) -> None:
    """Print the quantized edges and weights by how they are quantized, and what was left.

    A plan names all of them, a run whose page does the first and the last.
    """
    for title, rows in (("edges", report.edges), ("weights", report.weights)):
        for how, names in _by_slot(rows).items():
            _wrapped(f"{len(names)} {title}, {how}: ", _ends(names) if report.folder else names)
    if report.skipped:
        _wrapped(
            f"{len(report.skipped)} in floating point: ", [f"{k} ({v})" for k, v in report.skipped.items()]
        )


def _told(said: Any) -> None:  # noqa: ANN401  # a sentence, or rows
    if isinstance(said, str):
        _line(said)
        return
    head = tuple(dict.fromkeys(key for row in said for key in row))
    _table(head, [tuple(_cell(row.get(key)) for key in head) for row in said])


def sweep(
    rows: Sequence[Row], folder: Path | None = None, where: str | None = None, findings: Sequence[str] = ()
) -> None:
    """Print one line for each job, where they are, then why each failed one did and what repeats it.

    Args:
        where: the tracker's word for it.
        findings: sentences of its sweeper.
    """
    done = [row.metrics for row in rows if row.metrics]
    columns = list(dict.fromkeys((v, name) for metrics in done for v in metrics for name in metrics[v]))
    columns = sorted((column for column in columns if _differs(done, *column)), key=_is_fp32)[:6]
    table = [
        (row.varied, row.status, *(_figure(row.metrics.get(v, {}).get(name)) for v, name in columns))
        for row in rows
    ]
    _table(("job", "", *(f"{v} {name}" for v, name in columns)), table)
    for finding in findings:
        _line(finding)
    if folder:
        _line(f"sweep folder: {folder} (look at sweep.html)")
    if where:
        _line(where)
    for row in rows:
        if row.reason:
            error(f"{row.status}: {row.reason}\n    repeat it with: {row.command}")


def command(words: Iterable[str]) -> str:
    """Return the shell command that runs one job."""
    return "python -m qpipe " + shlex.join(words)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines of aligned columns."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _table(head: Sequence[str] | None, rows: Sequence[Sequence[str]]) -> None:
    if not is_rank_zero() or not rows:
        return
    if not sys.stdout.isatty():
        print("\n".join(aligned([*([head] if head else []), *rows])))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_header=head is not None, pad_edge=False)
    for index, name in enumerate(head or rows[0]):
        table.add_column(name, justify="right" if head and index else "left", style=None if index else "bold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _line(text: str) -> None:
    if is_rank_zero():
        print(text)


def _wrapped(lead: str, names: Iterable[str]) -> None:
    width = 110 if not sys.stdout.isatty() else min(shutil.get_terminal_size().columns, 120)
    _line(textwrap.fill(lead + ", ".join(names), width, subsequent_indent="    ", break_on_hyphens=False))


def _ends(names: Sequence[str]) -> Sequence[str]:
    return names if len(names) <= _NAMED else [*names[: _NAMED - 2], "…", *names[-2:]]


def _by_slot(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for row in rows:
        range_rule = f" {row['calibrator']}" if row.get("calibrator") else ""
        how = f"{row['num_bits']} bits {row['quantizer']}{range_rule} {row['granularity']}"
        groups.setdefault(how, []).append(row["name"])
    return groups


def _slot(config: _Config, slot: _Config | None) -> str:
    if slot is None:
        return "floating point"
    words = [(slot.get(kind) or config[kind])["name"] for kind in _KINDS]
    form = "symmetric" if slot["symmetric"] else "asymmetric"
    dynamic = ", dynamic" if slot.get("dynamic") else ""
    return f"{slot['num_bits']} bits {form}{dynamic}, {' '.join(words)}"


def _differs(done: Sequence[Mapping[str, Mapping[str, float]]], variant: str, name: str) -> bool:
    return len({metrics.get(variant, {}).get(name) for metrics in done}) > 1 or len(done) == 1


def _is_fp32(column: tuple[str, str]) -> bool:
    return column[0] == "fp32"


def _cell(value: Any) -> str:  # noqa: ANN401  # a plain value
    return (
        _figure(float(value)) if isinstance(value, (int, float)) else str(value if value is not None else "-")
    )


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
