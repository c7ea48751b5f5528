"""The values that pass between kinds and stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Role(StrEnum):
    """What a tensor is to the network."""

    WEIGHT = "weight"
    ACTIVATION = "activation"


@dataclass(frozen=True)
class QuantSpec:
    """What is asked of a tensor's codes.

    Args:
        num_bits: bits of a code.
        symmetric: zero_point is 0 (signed) and the range is centred; otherwise it follows the data.
        signed: codes run from -2^(b-1), not from 0.
        restricted: leave out the least code of a signed range, so that codes are centred (-127 to 127).
        dynamic: the range is taken from each tensor as it passes, not from calibration.
    """

    num_bits: int = 8
    symmetric: bool = True
    signed: bool = True
    restricted: bool = False
    dynamic: bool = False
    role: Role = Role.ACTIVATION

    @property
    def quant_min(self) -> int:
        """Least code."""
        return -(1 << (self.num_bits - 1)) + int(self.restricted) if self.signed else 0

    @property
    def quant_max(self) -> int:
        """Largest code."""
        return (1 << (self.num_bits - int(self.signed))) - 1


@dataclass(frozen=True)
class Range:
    """What a calibrator decided.

    Args:
        low, high: [B, 1] (or [B, R] for R candidates), units of x, low <= high.
    """

    low: Tensor
    high: Tensor

    def shrunk(self, ratios: Tensor) -> Range:
        """Return R candidates a block, both ends scaled by each of ratios [R]."""
        ratios = ratios.to(self.low)
        return Range(self.low * ratios, self.high * ratios)

    def clipped(self, magnitude: Tensor) -> Range:
        """Return the part of the range within +-magnitude [B, 1]."""
        return Range(self.low.clamp(-magnitude, magnitude), self.high.clamp(-magnitude, magnitude))

    def take(self, index: Tensor) -> Range:
        """Pick candidate index [B, 1] of each block."""
        return Range(self.low.gather(-1, index), self.high.gather(-1, index))


@dataclass(frozen=True)
class QParams:
    """What codes mean.

    Args:
        scale: [B, 1], real units per code step, > 0.
        zero_point: [B, 1], the code that stands for real 0, an integer held as a float.
        extra: whatever else a quantizer needs, by name (levels [B, L], say), first dimension B.
    """

    scale: Tensor
    zero_point: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Edge:
    """A tensor with one quantizer, at the call that produces it.

    Args:
        name: unique and printable: 'layer1.0.relu:1', 'layer1.0.add', 'input.0'.
        owner: dotted path of the module whose forward makes the call; '' is the root.
        op: what is executed as one operation: 'conv2d+relu', 'add', 'input'.
        call: the how-manieth call of that operation in one forward of its owner, from 0.
        consumers: names of the operations that read it.
    """

    name: str
    owner: str
    op: str
    call: int
    consumers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """What an engine executes: data from conf/target/*.yaml.

    Args:
        quantized: operations that run on codes; their inputs and outputs are edges.
        fused: activations that end an operation's fused chain without an edge before them.
        passthrough: operations that hand codes on unchanged.
        weight_only: operations whose weights are kept as codes, while they compute in floating point.
        outputs: whether results of quantized operations are edges too, and not their inputs alone.
        weight_bits, activation_bits: bits the engine executes; empty means any.
        weight_granularities, activation_granularities: granularities the engine executes; empty means any.
        weight_signed, weight_symmetric, activation_signed, activation_symmetric: None means either.
        dynamic: the engine computes activation ranges as it runs.
    """

    name: str
    quantized: tuple[str, ...]
    fused: tuple[str, ...] = ()
    passthrough: tuple[str, ...] = ()
    weight_only: tuple[str, ...] = ()
    outputs: bool = True
    weight_bits: tuple[int, ...] = ()
    activation_bits: tuple[int, ...] = ()
    weight_granularities: tuple[str, ...] = ()
    activation_granularities: tuple[str, ...] = ()
    weight_signed: bool | None = None
    weight_symmetric: bool | None = None
    activation_signed: bool | None = None
    activation_symmetric: bool | None = None
    dynamic: bool = True


@dataclass(frozen=True)
class Artifact:
    """A file or folder an exporter wrote and proved.

    Args:
        exporter: name of the exporter.
        engine: what executes it ('onnxruntime 1.32.0'), or 'simulated'.
        path: relative to the run's folder.
        sha256: of the file; of a folder, of its manifest.
        num_bytes: size on disk.
        proof: what was compared with the simulation, and how closely they agree.
        module: runs the file in its engine, called like the model; None when no engine executes it.
    """

    exporter: str
    engine: str
    path: Path
    sha256: str
    num_bytes: int
    proof: Mapping[str, Any] = field(default_factory=dict)
    module: torch.nn.Module | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Report:
    """The record of one run.

    Args:
        metrics: by variant ('fp32', 'simulated', 'onnx', ...) and metric name; a metric carries its unit.
        edges: the activations that were quantized, in order of execution, each with its slot's description.
        weights: the weights that were quantized, each with its slot's description.
        skipped: what was left in floating point, and why.
        notices: what a user should know: stand-ins, exporters passed over, simulated figures.
        identity: names everything the run depends on: what was chosen, code, weights, data.
        reused: what was not computed but taken from an earlier run.
    """

    metrics: Mapping[str, Mapping[str, float]]
    edges: tuple[Mapping[str, Any], ...] = ()
    weights: tuple[Mapping[str, Any], ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    artifacts: tuple[Artifact, ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    identity: str = ""
    reused: tuple[str, ...] = ()
