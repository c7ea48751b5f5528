"""What `python -m qpipe --help` says."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable

from qpipe.groups import groups, rank

_USAGE = """\
Quantize a PyTorch model, prove the files it becomes, and record the run.

usage: python -m qpipe [-m] [group=option ...] [key=value ...]
"""
_EXAMPLES = (
    ("", "the default job: the digits network in eight bits"),
    ("quantizer=kl granularity=channel", "ranges of least relative entropy, a scale for each channel"),
    ("weight.num_bits=4 weight.calibrator=mse", "weights and activations are two slots"),
    ("transform=[fold_bn] exporter=[onnx] out=runs/mine", "lists in run order, and where the run goes"),
    ("-m calibrator=minmax,kl,mse weight.num_bits=8,4", "a sweep: every combination"),
)
_FLAGS = (
    ("-m, --multirun", "run every combination of values written a,b or range(a,b)"),
    ("--cfg", "print the resolved configuration and stop"),
    ("--config FILE", "start from a run's config.yaml instead of the groups"),
    ("--version, --help", "say which version this is; print this page"),
    ("plan=true", "say what would be quantized, and touch nothing"),
    ("gate.max_drop=1  gate.min=…  gate.metric=…", "a result that loses more exits with 3; the run is kept"),
    ("out=FOLDER", "the run's folder (default runs/<date-time>)"),
    ("cache=false", "compute everything; otherwise what earlier runs found out is reused, and said so"),
    ("hydra/launcher=joblib  hydra.launcher.n_jobs=4", "a sweep's jobs in parallel processes"),
    ("seed=0", "the seed of every random generator"),
    ("layers=[{match:'stem.*',weight:{num_bits:8}}]", "rules for single layers, first to last"),
)
_KEYS = """\
The slots weight and activation take num_bits, symmetric, signed, restricted and (activation) dynamic, and a
quantizer, calibrator or granularity of their own: weight.calibrator=mse. activation=null leaves them in
floating point."""


def help_text() -> str:
    """Return the help page: usage, every group with its options, examples."""
    width = min(shutil.get_terminal_size((110, 24)).columns, 120)
    found = groups()
    lines = [_USAGE, "Groups, and what can be chosen of each:"]
    for group in sorted(found, key=rank):
        lines.append(f"  {group}")
        lines += _rows([(name, found[group][name].description) for name in sorted(found[group])], 20, width)
    lines += ["", _KEYS, "", "Flags and keys:", *_rows(_FLAGS, 47, width), "", "Examples:"]
    lines += [f"    python -m qpipe {words}".rstrip() + f"\n        {why}" for words, why in _EXAMPLES]
    return "\n".join(lines)


def _rows(rows: Iterable[tuple[str, str]], column: int, width: int) -> list[str]:
    """Align two columns, the second wrapped."""
    lines = []
    for left, right in rows:
        wrapped = textwrap.wrap(right, max(width - column - 6, 30)) or [""]
        lines.append(f"    {left:<{column}} {wrapped[0]}".rstrip())
        lines += [" " * (column + 5) + more for more in wrapped[1:]]
    return lines
