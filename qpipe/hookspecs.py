"""Every extension point; nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from qpipe.kinds.calibrator import Calibrator
    from qpipe.kinds.evaluator import Evaluator
    from qpipe.kinds.exporter import Exporter
    from qpipe.kinds.finetune import FinetuneStrategy
    from qpipe.kinds.granularity import Granularity
    from qpipe.kinds.quantizer import Quantizer
    from qpipe.kinds.sweeper import Sweeper
    from qpipe.kinds.tracker import Tracker
    from qpipe.kinds.transform import Transform

hookspec = pluggy.HookspecMarker("qpipe")
hookimpl = pluggy.HookimplMarker("qpipe")


@hookspec
def qpipe_register_transform() -> list[type[Transform]]:  # type: ignore[empty-body]
    """Offer ways to rewrite a float model before it is quantized."""


@hookspec
def qpipe_register_granularity() -> list[type[Granularity]]:  # type: ignore[empty-body]
    """Offer ways to split a tensor into blocks that share parameters."""


@hookspec
def qpipe_register_calibrator() -> list[type[Calibrator[Any]]]:  # type: ignore[empty-body]
    """Offer rules that turn what was seen of a tensor into its range."""


@hookspec
def qpipe_register_quantizer() -> list[type[Quantizer[Any]]]:  # type: ignore[empty-body]
    """Offer sets of levels, and how values are rounded to them."""


@hookspec
def qpipe_register_finetune() -> list[type[FinetuneStrategy]]:  # type: ignore[empty-body]
    """Offer ways to improve a calibrated model: reconstruction and training."""


@hookspec
def qpipe_register_evaluator() -> list[type[Evaluator]]:  # type: ignore[empty-body]
    """Offer measurements."""


@hookspec
def qpipe_register_exporter() -> list[type[Exporter]]:  # type: ignore[empty-body]
    """Offer file formats that are proved to run."""


@hookspec
def qpipe_register_tracker() -> list[type[Tracker]]:  # type: ignore[empty-body]
    """Offer places where runs are recorded."""


@hookspec
def qpipe_register_sweeper() -> list[type[Sweeper]]:  # type: ignore[empty-body]
    """Offer ways to choose the points of a sweep by what earlier ones gave."""
