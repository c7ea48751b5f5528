"""The scales between layers that make the expected quantization noise of the output least."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qpipe import QuantSpec, Recipe, Role, Slot, Task
from qpipe.task import Batches

# Adam takes full steps however small the slope, which is a share of all noise here. Channels of less than
# this share stay: scaled to what few samples showed of them, they would leave the range once they wake.
_STILL = 1e-3


@dataclass
class _Layer:
    """A layer, and how much of its noise reaches the model's output.

    Args:
        low, high: range of each input channel, [I].
        weight_gain: mean square of the output's derivative by each weight, like weight.
        input_gain: mean of the same by the elements of each input channel, summed over its elements, [I].
        before, after: numbers of the pairs whose channels enter and leave it.
    """

    weight: Tensor
    groups: int
    slot: Slot | None
    low: Tensor
    high: Tensor
    weight_gain: Tensor
    input_gain: Tensor
    before: int | None = None
    after: int | None = None

    def noise(self, logs: Sequence[Tensor], activation: QuantSpec | None) -> Tensor:
        """Return the output noise that its weights and its inputs cause, for log scales of the pairs."""
        enter = logs[self.before].exp() if self.before is not None else torch.ones_like(self.high)
        leave = (
            logs[self.after].exp()
            if self.after is not None
            else torch.ones_like(self.weight.flatten(1)[:, 0])
        )
        noise = self._weight_noise(enter, leave)
        return (
            noise
            if activation is None or self.before is None
            else noise + self._input_noise(enter, activation)
        )

    def _weight_noise(self, enter: Tensor, leave: Tensor) -> Tensor:
        if self.slot is None:
            return leave.sum() * 0
        spec, granularity = self.slot.spec, self.slot.granularity
        ratio = enter.reshape(self.groups, 1, -1) / leave.reshape(self.groups, -1, 1)
        ratio = ratio.flatten(0, 1).reshape(*self.weight.shape[:2], *[1] * (self.weight.dim() - 2))
        blocks = granularity.to_blocks(self.weight * ratio)
        low, high = blocks.amin(1, keepdim=True).clamp(max=0), blocks.amax(1, keepdim=True).clamp(min=0)
        width = 2 * torch.maximum(-low, high) if spec.symmetric else high - low
        step = width / (spec.quant_max - spec.quant_min)
        steps = granularity.from_blocks(step.expand(blocks.shape), self.weight.shape)
        return ((steps / ratio).square() * self.weight_gain).sum() / 12

    def _input_noise(self, enter: Tensor, spec: QuantSpec) -> Tensor:
        width = (self.high / enter).amax() - (self.low / enter).amin()
        step = width / (spec.quant_max - spec.quant_min)
        return (enter.square() * self.input_gain).sum() * step.square() / 12


def least_noise(
    model: nn.Module,
    pairs: Sequence[tuple[str, str]],
    batches: Batches,
    task: Task,
    recipe: Recipe,
    steps: int = 200,
    num_samples: int = 32,
    lr: float = 0.05,
) -> list[Tensor]:
    """Return for each pair of layers the scales [C] of the channels between them.

    Rounding is taken for independent noise of step^2 / 12 that reaches the output to first order.
    """
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    layers = _observe(model, names, batches, task, recipe, num_samples)
    for number, (first, second) in enumerate(pairs):
        layers[first].after = layers[second].before = number
    spec = recipe.activation.spec if recipe.activation else None
    with torch.enable_grad():
        logs = [torch.zeros_like(layers[second].high).requires_grad_() for _, second in pairs]
        optimizer = torch.optim.Adam(logs, lr=lr, eps=_STILL)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        for _ in range(steps):
            optimizer.zero_grad()
            torch.stack([layer.noise(logs, spec) for layer in layers.values()]).sum().log().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return [log.detach().exp() for log in logs]


def _observe(
    model: nn.Module, names: Sequence[str], batches: Batches, task: Task, recipe: Recipe, num_samples: int
) -> dict[str, _Layer]:
    """Return layers with their gains: derivatives of a random sum of the outputs, sample by sample."""
    modules = {name: model.get_submodule(name) for name in names}
    layers: dict[str, _Layer] = {}
    count = 0
    signs = torch.Generator().manual_seed(0)
    with _graph(modules) as inputs:
        for args, kwargs in islice(_samples(batches, task), num_samples):
            count += 1
            output = task.compared(model(*args, **kwargs))
            sign = torch.randint(0, 2, output.shape, generator=signs) * 2.0 - 1
            total = (output * sign.to(output)).sum()
            weights = [module.get_parameter("weight") for module in modules.values()]
            grads = torch.autograd.grad(total, [*weights, *(inputs[name] for name in names)])
            for name, by_weight, by_input in zip(names, grads, grads[len(names) :], strict=False):
                _note(layers, name, modules[name], recipe, inputs[name].detach(), by_weight, by_input)
    for layer in layers.values():
        layer.weight_gain /= count
        layer.input_gain /= count
    return layers


def _note(
    layers: dict[str, _Layer],
    name: str,
    module: Any,  # noqa: ANN401  # a linear or convolutional layer
    recipe: Recipe,
    x: Tensor,
    by_weight: Tensor,
    by_input: Tensor,
) -> None:
    dim = x.dim() - 1 if isinstance(module, nn.Linear) else 1
    rows, slopes = (t.transpose(0, dim).flatten(1) for t in (x, by_input))
    if name not in layers:
        zero, slot = torch.zeros_like(rows[:, 0]), recipe.slot(name, Role.WEIGHT)
        weight = module.weight.detach()
        layers[name] = _Layer(
            weight, getattr(module, "groups", 1), slot, zero, zero, torch.zeros_like(weight), zero.clone()
        )
    layer = layers[name]
    layer.low, layer.high = layer.low.minimum(rows.amin(1)), layer.high.maximum(rows.amax(1))
    layer.weight_gain += by_weight.square()
    layer.input_gain += slopes.square().sum(1)


@contextmanager
def _graph(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Record derivatives by weights and by inputs, which are kept by name."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:  # noqa: ANN401  # a forward hook
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            inputs[name] = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
            return (inputs[name], *args[1:])

        return hook

    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        for name, module in modules.items():
            weight: Any = module._parameters["weight"]
            stack.callback(weight.requires_grad_, weight.requires_grad)
            weight.requires_grad_()
            stack.callback(module.register_forward_pre_hook(keep(name)).remove)
        yield inputs


def _samples(batches: Batches, task: Task) -> Iterator[tuple[Any, Any]]:
    """Yield the model's arguments sample by sample."""
    for batch in batches:
        call = task.inputs(batch)
        tensors = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor) and leaf.dim() > 0]
        size = max(len(tensor) for tensor in tensors)
        for i in range(size):

            def one(leaf: Any, i: int = i, size: int = size) -> Any:  # noqa: ANN401
                per_sample = isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == size
                return leaf[i : i + 1] if per_sample else leaf

            yield pytree.tree_map(one, call)
