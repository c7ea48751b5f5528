"""Everything chosen for a run, as objects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from qpipe.cache import Shelf
from qpipe.gate import Gate
from qpipe.kinds.calibrator import Calibrator
from qpipe.kinds.evaluator import Evaluator
from qpipe.kinds.exporter import Exporter
from qpipe.kinds.finetune import FinetuneStrategy
from qpipe.kinds.granularity import Granularity
from qpipe.kinds.quantizer import Quantizer
from qpipe.kinds.transform import Transform
from qpipe.types import QuantSpec, Role, Target


@dataclass(frozen=True)
class Slot:
    """How the tensors of one role are quantized."""

    quantizer: Quantizer[Any]
    calibrator: Calibrator[Any]
    granularity: Granularity
    spec: QuantSpec

    def describe(self) -> dict[str, Any]:
        """Return the slot as plain data, for tables and reports."""
        spec = self.spec
        return {
            "num_bits": spec.num_bits,
            "quantizer": self.quantizer.name,
            "calibrator": self.calibrator.name if self.quantizer.uses_range else None,
            "granularity": self.granularity.name,
            "symmetric": spec.symmetric,
            "signed": spec.signed,
            "dynamic": spec.dynamic,
        }


@dataclass(frozen=True)
class SlotEdit:
    """What a layer rule changes of a slot; what is None stays."""

    quantizer: Quantizer[Any] | None = None
    calibrator: Calibrator[Any] | None = None
    granularity: Granularity | None = None
    spec: Mapping[str, Any] = field(default_factory=dict)
    off: bool = False  # leave in floating point

    def apply(self, slot: Slot | None, base: Slot | None) -> Slot | None:
        """Return the slot after the change; base stands in where the role was in floating point."""
        start = slot or base
        if self.off or start is None:
            return None
        return Slot(
            self.quantizer or start.quantizer,
            self.calibrator or start.calibrator,
            self.granularity or start.granularity,
            replace(start.spec, **self.spec),
        )


@dataclass(frozen=True)
class LayerRule:
    """Changes for the weights and edges whose name matches a glob."""

    match: str
    edits: Mapping[Role, SlotEdit]


@dataclass(frozen=True)
class Recipe:
    """What is to be done; weight or activation None leaves that role in floating point.

    Args:
        shelf: where transforms and strategies keep results they would not like to compute again; its entries
            depend on all that was chosen and done before the one it is handed to.
    """

    weight: Slot | None
    activation: Slot | None
    target: Target
    layers: tuple[LayerRule, ...] = ()
    transforms: tuple[Transform, ...] = ()
    finetune: tuple[FinetuneStrategy, ...] = ()
    evaluators: tuple[Evaluator, ...] = ()
    exporters: tuple[Exporter, ...] = ()
    gate: Gate = field(default_factory=Gate)  # open
    notices: tuple[str, ...] = ()  # stand-ins and exporters passed over, decided while the recipe was built
    shelf: Shelf = field(default_factory=Shelf, compare=False, kw_only=True)

    def slot(self, name: str, role: Role) -> Slot | None:
        """Return the slot of a weight (by module path) or an edge (by name), rules applied first to last."""
        base = chosen = self.weight if role is Role.WEIGHT else self.activation
        for rule in self.layers:
            if role in rule.edits and fnmatchcase(name, rule.match):
                chosen = rule.edits[role].apply(chosen, base)
        return chosen

    def every_slot(self) -> Iterator[tuple[Role, Slot]]:
        """Yield every slot a tensor of the model may get."""
        for role, base in ((Role.WEIGHT, self.weight), (Role.ACTIVATION, self.activation)):
            edits = [rule.edits[role].apply(base, base) for rule in self.layers if role in rule.edits]
            yield from ((role, slot) for slot in (base, *edits) if slot is not None)


@dataclass(frozen=True)
class Reference:
    """The float model, in eval mode: baseline and teacher; nobody changes it."""

    model: nn.Module
