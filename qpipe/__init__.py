"""qpipe: compose any quantizer, calibrator, granularity and fine-tuning strategy on any PyTorch model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qpipe.artifact import write_codes
    from qpipe.cache import Entry, Shelf
    from qpipe.conversion import CodedActivation, CodedWeight, DynamicActivation, convert
    from qpipe.errors import DataError, GateError, PluginError, ProofError, QpipeError, RecipeError
    from qpipe.hookspecs import hookimpl
    from qpipe.kinds.calibrator import Calibrator
    from qpipe.kinds.evaluator import Evaluator, Subject
    from qpipe.kinds.exporter import ExportContext, Exporter, Operation
    from qpipe.kinds.finetune import FinetuneStrategy
    from qpipe.kinds.granularity import Granularity
    from qpipe.kinds.quantizer import Quantizer
    from qpipe.kinds.sweeper import Sweeper
    from qpipe.kinds.tracker import Tracker
    from qpipe.kinds.transform import Transform
    from qpipe.loading import load
    from qpipe.packing import pack, payload_bytes, unpack
    from qpipe.pipeline import quantize, run
    from qpipe.recipe import Recipe, Reference, Slot
    from qpipe.sharing import is_shared, shared, shared_copy
    from qpipe.stages.data import calibration_batches, evaluation_batches
    from qpipe.stages.evaluate import ReferenceOutputs, score
    from qpipe.statistics import BatchExtremes, Distribution, Extremes, Histogram, Samples, Statistics
    from qpipe.tables import TabledWeight
    from qpipe.task import Task
    from qpipe.training import Learner, TrainingStrategy
    from qpipe.types import Artifact, Edge, QParams, QuantSpec, Range, Report, Role, Target

_HOME = {
    "artifact": ["write_codes"],
    "cache": ["Entry", "Shelf"],
    "conversion": ["CodedActivation", "CodedWeight", "DynamicActivation", "convert"],
    "errors": ["DataError", "GateError", "PluginError", "ProofError", "QpipeError", "RecipeError"],
    "hookspecs": ["hookimpl"],
    "kinds.calibrator": ["Calibrator"],
    "kinds.evaluator": ["Evaluator", "Subject"],
    "kinds.exporter": ["ExportContext", "Exporter", "Operation"],
    "kinds.finetune": ["FinetuneStrategy"],
    "kinds.granularity": ["Granularity"],
    "kinds.quantizer": ["Quantizer"],
    "kinds.sweeper": ["Sweeper"],
    "kinds.tracker": ["Tracker"],
    "kinds.transform": ["Transform"],
    "loading": ["load"],
    "packing": ["pack", "payload_bytes", "unpack"],
    "pipeline": ["quantize", "run"],
    "recipe": ["Recipe", "Reference", "Slot"],
    "sharing": ["is_shared", "shared", "shared_copy"],
    "stages.data": ["calibration_batches", "evaluation_batches"],
    "stages.evaluate": ["ReferenceOutputs", "score"],
    "statistics": ["BatchExtremes", "Distribution", "Extremes", "Histogram", "Samples", "Statistics"],
    "tables": ["TabledWeight"],
    "task": ["Task"],
    "training": ["Learner", "TrainingStrategy"],
    "types": ["Artifact", "Edge", "QParams", "QuantSpec", "Range", "Report", "Role", "Target"],
}
_MODULE = {name: f"qpipe.{module}" for module, names in _HOME.items() for name in names}

__all__ = [*_MODULE]


def __getattr__(name: str) -> Any:  # noqa: ANN401  # PEP 562
    if name not in _MODULE:
        raise AttributeError(f"module 'qpipe' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE[name]), name)


def __dir__() -> list[str]:
    return sorted(_MODULE)
