"""The scales between layers that make the expected quantization noise least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qpipe import QuantSpec, Recipe, Role, Slot, Task
from qpipe.task import Batches


@dataclass
class _Seen:
    """What reaches a layer, for each input channel; and the variance of each output."""

    low: Tensor
    high: Tensor
    square: Tensor
    output: Tensor
    output_square: Tensor
    count: int = 1

    @property
    def variance(self) -> Tensor:
        """Of each output."""
        return self.output_square / self.count - (self.output / self.count).square()


@dataclass
class _Layer:
    """A layer's noise in the units of its unscaled outputs.

    Args:
        before, after: names of the pairs whose channels enter and leave it.
    """

    weight: Tensor
    groups: int
    slot: Slot | None
    seen: _Seen
    importance: Tensor
    before: int | None = None
    after: int | None = None
    energy: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.energy = self.weight.flatten(2).square().sum(2)  # [O, I]

    def inputs(self, x: Tensor) -> Tensor:
        """Spread one value an input channel [G * I] to [O, I], as each output reads them."""
        grouped = x.reshape(self.groups, 1, -1)
        return grouped.expand(-1, len(self.weight) // self.groups, -1).flatten(0, 1)

    def noise(self, logs: Sequence[Tensor], activation: QuantSpec | None) -> Tensor:
        """Return the noise over the signal of the outputs, both weighted by importance."""
        enter = logs[self.before].exp() if self.before is not None else torch.ones_like(self.seen.high)
        leave = logs[self.after].exp() if self.after is not None else torch.ones_like(self.importance)
        noise = self._weight_noise(enter, leave) + self._activation_noise(enter, activation)
        return (noise * self.importance).sum() / (self.seen.variance * self.importance).sum()

    def _weight_noise(self, enter: Tensor, leave: Tensor) -> Tensor:
        if self.slot is None:
            return torch.zeros_like(leave)
        spec, granularity = self.slot.spec, self.slot.granularity
        tail = [1] * (self.weight.dim() - 2)
        scaled = self.weight * (self.inputs(enter) / leave[:, None]).reshape(*self.energy.shape, *tail)
        blocks = granularity.to_blocks(scaled)
        step = 2 * blocks.abs().amax(1, keepdim=True) / (spec.quant_max - spec.quant_min)
        step = granularity.from_blocks(step.expand(blocks.shape), scaled.shape).flatten(2)
        power = self.inputs(self.seen.square / enter.square())
        return (step.square().sum(2) * power).sum(1) / 12 * leave.square()

    def _activation_noise(self, enter: Tensor, spec: QuantSpec | None) -> Tensor:
        if spec is None:
            return torch.zeros_like(self.importance)
        width = (self.seen.high / enter).amax() - (self.seen.low / enter).amin()
        step = width / (spec.quant_max - spec.quant_min)
        return (self.energy * self.inputs(enter.square())).sum(1) * step.square() / 12


def least_noise(
    model: nn.Module,
    pairs: Sequence[tuple[str, str]],
    batches: Batches,
    task: Task,
    recipe: Recipe,
    steps: int = 200,
    lr: float = 0.05,
) -> list[Tensor]:
    """Return for each pair of layers the scales [C] of the channels between them.

    Rounding is taken for independent noise of step^2 / 12; the sum over layers of noise to signal is made
    least, an output channel counting by the weights that read it.
    """
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    layers = _layers(model, names, pairs, _observe(model, names, batches, task), recipe)
    spec = recipe.activation.spec if recipe.activation else None
    with torch.enable_grad():
        logs = [torch.zeros_like(layers[first].importance).requires_grad_() for first, _ in pairs]
        optimizer = torch.optim.Adam(logs, lr=lr)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        for _ in range(steps):
            optimizer.zero_grad()
            torch.stack([layer.noise(logs, spec) for layer in layers.values()]).sum().log().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return [log.detach().exp() for log in logs]


def _layers(
    model: nn.Module,
    names: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    seen: Mapping[str, _Seen],
    recipe: Recipe,
) -> dict[str, _Layer]:
    layers = {}
    for name in names:
        module: Any = model.get_submodule(name)
        slot = recipe.slot(name, Role.WEIGHT)
        weight = module.weight.detach()
        groups = getattr(module, "groups", 1)
        layers[name] = _Layer(weight, groups, slot, seen[name], torch.ones_like(weight.flatten(1)[:, 0]))
    for number, (first, second) in enumerate(pairs):
        reader = layers[second]
        layers[first].after = reader.before = number
        energy = reader.energy.unflatten(0, (reader.groups, -1)).sum(1)
        layers[first].importance = energy.flatten()
    return layers


@torch.no_grad()
def _observe(model: nn.Module, names: Sequence[str], batches: Batches, task: Task) -> dict[str, _Seen]:
    seen: dict[str, _Seen] = {}

    def note(name: str) -> Any:  # noqa: ANN401  # a forward hook
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            new = _summary(module, args[0], output)
            seen[name] = _merged(seen[name], new) if name in seen else new

        return hook

    with ExitStack() as stack:
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_hook(note(name)).remove)
        for batch in batches:
            args, kwargs = task.inputs(batch)
            model(*args, **kwargs)
    for one in seen.values():
        one.square /= one.count * one.output.new_ones(())
    return seen


def _summary(module: nn.Module, x: Tensor, y: Tensor) -> _Seen:
    x, y = (
        t.reshape(-1, t.shape[-1]).T if isinstance(module, nn.Linear) else t.transpose(0, 1).flatten(1)
        for t in (x, y)
    )
    mean_square = x.square().mean(1) * y.shape[1]  # counted as often as outputs
    return _Seen(x.amin(1), x.amax(1), mean_square, y.sum(1), y.square().sum(1), y.shape[1])


def _merged(a: _Seen, b: _Seen) -> _Seen:
    return _Seen(
        torch.minimum(a.low, b.low),
        torch.maximum(a.high, b.high),
        a.square + b.square,
        a.output + b.output,
        a.output_square + b.output_square,
        a.count + b.count,
    )
