"""Run a prepared model on one batch again and again, computing only what lies behind a change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qpipe import QpipeError
from qpipe.nn import EdgeQuantizers, FakeQuant, calls_so_far

_OURS = (FakeQuant, EdgeQuantizers)


@dataclass(frozen=True)
class _Kept:
    """What a layer gave, its version then, and which calls its owner had counted by then."""

    layer: nn.Module
    output: Any
    version: int
    calls: Mapping[str, int]


class Replay:
    """Remember what every layer gives for one batch, and start later runs behind what has changed since.

    Layers are the modules without children. Each run calls them in the same order; those before the first
    use of a changed quantizer give what they gave. What is computed between layers, by functions, is
    computed again. Memory: every layer's output for the batch.

    Args:
        call: (args, kwargs) of the model's forward.
    """

    def __init__(self, model: nn.Module, call: tuple[Any, Any]) -> None:
        self.model, self.call = model, call
        self.layers = [m for m in model.modules() if not isinstance(m, _OURS) and _is_layer(m)]
        self.kept: list[_Kept] = []
        self.first: dict[
            FakeQuant, int
        ] = {}  # the call of a layer in or after which a quantizer is first used
        self.copied: set[int] = set()  # calls whose output is written to later on, by functions in place
        self.index = self.start = 0
        self.recording = True
        self.output = self._record()

    def run(self, changed: Sequence[FakeQuant]) -> Any:  # noqa: ANN401  # a user's output
        """Return the output of the model as it is now, these quantizers (or what they see) having changed."""
        self.start = min(self.first.get(fake_quant, len(self.kept)) for fake_quant in changed)
        return self._forward()

    def _record(self) -> Any:  # noqa: ANN401
        with ExitStack() as stack:
            for quantizer in [m for m in self.model.modules() if isinstance(m, FakeQuant)]:
                stack.callback(quantizer.register_forward_pre_hook(self._note).remove)
            output = self._forward()
            self.copied = {i for i, kept in enumerate(self.kept) if _version(kept.output) != kept.version}
            if self.copied:  # what was kept of these is not what the layer gave
                self.kept = []
                output = self._forward()
        self.recording = False
        return output

    def _note(self, quantizer: nn.Module, args: Any) -> None:  # noqa: ANN401
        if isinstance(quantizer, FakeQuant):
            self.first.setdefault(quantizer, max(self.index - 1, 0))

    def _forward(self) -> Any:  # noqa: ANN401
        self.index = 0
        args, kwargs = self.call
        with torch.no_grad(), self._watched():
            return self.model(*args, **kwargs)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            for layer in self.layers:
                layer.__dict__["forward"] = partial(self._layer, layer)
            yield
        finally:
            for layer in self.layers:
                del layer.__dict__["forward"]

    def _layer(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        index, self.index = self.index, self.index + 1
        if not self.recording and index < self.start:
            kept = self.kept[index]
            if kept.layer is not layer:
                raise QpipeError("the model does not call its layers in the same order each time")
            calls_so_far().update(kept.calls)
            return _copy(kept.output) if index in self.copied else kept.output
        output = type(layer).forward(layer, *args, **kwargs)
        if self.recording:
            copy = _copy(output) if index in self.copied else output
            self.kept.append(_Kept(layer, copy, _version(copy), dict(calls_so_far())))
        return output


def _is_layer(module: nn.Module) -> bool:
    return all(isinstance(child, _OURS) for child in module.children())


def _copy(output: Any) -> Any:  # noqa: ANN401
    return torch.utils._pytree.tree_map_only(Tensor, torch.clone, output)


def _version(output: Any) -> int:  # noqa: ANN401
    return sum(x._version for x in torch.utils._pytree.tree_leaves(output) if isinstance(x, Tensor))
