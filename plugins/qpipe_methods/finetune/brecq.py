"""Learn the roundings of whole blocks, or of the network, by what they give together."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qpipe import FinetuneStrategy, QParams, hookimpl
from qpipe.nn import FakeQuant, QuantizedModule, QuantizedWeight, edge_quantizers, weight_quantizers
from qpipe.recipe import Slot
from qpipe.training import Learner
from qpipe_methods.finetune._layerwise import check_even
from qpipe_methods.finetune.adaround import inverse_h, rectified, regularizer
from qpipe_methods.finetune.lsq import LearnedStep
from qpipe_methods.reconstruction import Arguments, Unit, float_parameter, quantized_layers, sensitivity, walk

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule, Trainer

    from qpipe import Recipe, Reference, Task

log = logging.getLogger("qpipe")
_UNITS = ("layer", "block", "network")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class BRECQ(FinetuneStrategy):
    """Learn roundings, scales and biases of one unit after the other by the error of its output.

    A rounding starts where earlier strategies left it, between that code and its neighbour on the side of
    the float weight. What a unit learned is kept where its output errs less than before on all samples.

    Args:
        unit: 'layer'; 'block': the outermost modules whose class occurs more than once, other layers each on
            their own; 'network': all at once, by the network's output.
        iterations: Adam steps a unit, each on one batch of the data.
        lr: of the roundings.
        scale_lr: of the weights' scales and the biases, relative to their mean magnitude; 0: they stay.
        step_lr: of the activations' steps, likewise. Both fall to 0 along a cosine.
        drop: probability that an element of an activation is left unquantized, and that an element of the
            unit's input is the float model's (QDrop).
        fisher: weigh errors by the squared gradient of the network's output at the unit's output.
        regularization, beta, warm_start: as for AdaRound.
        num_samples: of the calibration set.
        memory_gb: for activations.

    Source: Li et al., 2021, arXiv 2102.05426, eq. 10; Wei et al. (QDrop), 2022, arXiv 2203.05740, eq. 7.
    Equation: min E[Σ (∂L/∂z)² (z - z')²] over the codes of a unit with output z; fisher=false: (z - z')²
    """

    name = "brecq"

    def __init__(
        self,
        unit: str = "block",
        iterations: int = 500,
        lr: float = 0.02,
        scale_lr: float = 0.0,
        step_lr: float = 4e-4,
        drop: float = 0.5,
        fisher: bool = False,
        regularization: float = 1000.0,
        beta: tuple[float, float] = (20.0, 2.0),
        warm_start: float = 0.2,
        num_samples: int = 128,
        memory_gb: float = 4.0,
    ) -> None:
        if unit not in _UNITS:
            raise ValueError(f"unit is one of {', '.join(_UNITS)}, not {unit!r}")
        if not 0 <= drop <= 1:
            raise ValueError(f"drop={drop} lies outside 0 to 1")
        self.unit = unit
        self.iterations = iterations
        self.lr = lr
        self.scale_lr = scale_lr
        self.step_lr = step_lr
        self.drop = drop
        self.fisher = fisher
        self.regularization = regularization
        self.beta = beta
        self.warm_start = warm_start
        self.num_samples = num_samples
        self.memory_gb = memory_gb

    def check_prepared(self, model: nn.Module) -> None:
        """Raise RecipeError where a layer's levels are not evenly spaced."""
        check_even(self.name, model)

    def fit(
        self,
        model: nn.Module,
        reference: Reference,
        data: LightningDataModule,
        task: Task,
        recipe: Recipe,
        trainer: Trainer,
    ) -> None:
        """Improve every unit, in order of execution."""
        units = find_units(model, self.unit)
        weights: dict[nn.Module, list[Tensor]] = {}
        if self.fisher:
            weights = sensitivity(model, data, task, units, self.num_samples)

        def improve(unit: Unit) -> None:
            self._improve(model, unit, weights.get(unit.module))

        walk(
            model,
            data,
            task,
            units,
            improve,
            num_samples=self.num_samples,
            memory_gb=self.memory_gb,
            title=self.name,
            shelf=recipe.shelf,
        )

    def _improve(self, model: nn.Module, unit: Unit, fisher: Sequence[Tensor] | None) -> None:
        def soft(weight: QuantizedWeight) -> SoftRounding:
            return _soft(model, weight)

        def learn(before: float) -> None:
            with _seeded(), learning(model, unit.module, soft, self.drop) as (roundings, steps):
                self._learn(unit, fisher, before, roundings, steps)

        keep_if_better(self.name, unit, learn, fisher)

    def _learn(
        self,
        unit: Unit,
        fisher: Sequence[Tensor] | None,
        before: float,
        roundings: Sequence[SoftRounding],
        steps: Sequence[DroppedStep],
    ) -> None:
        count = sum(rounding.v.numel() for rounding in roundings)
        optimizer, schedule = self._optimizer(unit.module, roundings, steps)
        start = int(self.warm_start * self.iterations)
        draw = torch.Generator().manual_seed(0)
        for i in range(self.iterations):
            b = int(torch.randint(len(unit.calls), (), generator=draw))
            with torch.enable_grad():
                error = batch_error(unit, b, fisher, self.drop)
                loss = error * (count / before)
                if i >= start and self.regularization:
                    progress = (i - start) / max(1, self.iterations - start)
                    beta = self.beta[0] + (self.beta[1] - self.beta[0]) * progress
                    penalty = sum(regularizer(rounding.h(), beta) for rounding in roundings)
                    loss = loss + self.regularization * penalty
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()

    def _optimizer(
        self, module: nn.Module, roundings: Sequence[SoftRounding], steps: Sequence[DroppedStep]
    ) -> tuple[torch.optim.Adam, torch.optim.lr_scheduler.LambdaLR]:
        groups: list[dict[str, Any]] = [{"params": [r.v for r in roundings], "lr": self.lr}]
        scales = [r.scale for r in roundings] + _biases(module)
        for lr, parameters in ((self.scale_lr, scales), (self.step_lr, [s.scale for s in steps])):
            for parameter in parameters if lr else []:
                magnitude = parameter.detach().abs().mean().clamp(min=1e-8).item()
                groups.append({"params": [parameter.requires_grad_()], "lr": lr * magnitude})
        falling = [lambda i: 0.5 + 0.5 * math.cos(math.pi * i / self.iterations)] * (len(groups) - 1)
        optimizer = torch.optim.Adam(groups, fused=True)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda _: 1.0, *falling])


def keep_if_better(
    name: str, unit: Unit, learn: Callable[[float], None], fisher: Sequence[Tensor] | None = None
) -> None:
    """Let a unit learn where its output errs, and undo it where the error on all samples grows.

    Args:
        learn: changes the unit; takes its error before.
    """
    before = _error(unit, fisher)
    if before == 0:
        return
    state = {key: value.clone() for key, value in unit.module.state_dict().items()}
    learn(before)
    after = _error(unit, fisher)
    log.info("%s: the error of '%s' falls to %.3f", name, unit.name, after / before)
    if after > before:
        unit.module.load_state_dict(state)


@contextmanager
def _seeded() -> Iterator[None]:
    """Draw the same for a unit whatever was drawn before it, so that a resumed run is the same run."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        yield


def find_units(model: nn.Module, kind: str) -> dict[nn.Module, str]:
    """Return the modules to be improved one after the other, with their paths.

    Args:
        kind: 'layer', 'block' or 'network'.
    """
    layers = quantized_layers(model)
    if kind == "network":
        return {model: "the network"}
    times = Counter(_class(module) for module in model.modules())
    units: dict[nn.Module, str] = {}
    covered: set[nn.Module] = set()
    for name, module in model.named_modules():
        is_block = times[_class(module)] > 1 and not isinstance(module, _CONTAINERS) and kind == "block"
        inside = [child for child in module.modules() if child in layers]
        if module not in covered and inside and (is_block or module in layers):
            units[module] = name
            covered.update(module.modules())
    return units


def _class(module: nn.Module) -> type[nn.Module]:
    return module._qpipe_base if isinstance(module, QuantizedModule) else type(module)


class LearnedRounding(Learner):
    """A weight whose rounding is learned."""

    @abstractmethod
    def rounded(self, shape: torch.Size) -> Tensor:
        """Return the weight on its codes, in a shape."""


R = TypeVar("R", bound=LearnedRounding)


@contextmanager
def learning(
    model: nn.Module, module: nn.Module, rounding: Callable[[QuantizedWeight], R], drop: float = 0.0
) -> Iterator[tuple[list[R], list[DroppedStep]]]:
    """Put learners into a module's quantizers; at the end their roundings, scales and steps stay behind."""
    layers = quantized_layers(model)
    chosen = [w for w in weight_quantizers(module) if w.module in layers and w.parameter_name == "weight"]
    roundings = [rounding(weight) for weight in chosen]
    edges = [e for e in edge_quantizers(module) if _learns(e)]
    steps = [DroppedStep(edge.slot, edge.qparams(), drop) for edge in edges]
    placed: list[tuple[FakeQuant, Learner]] = [
        *((w.fake_quant, r) for w, r in zip(chosen, roundings, strict=True)),
        *zip(edges, steps, strict=True),
    ]
    with ExitStack() as stack:
        for parameter in model.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        for fake_quant, learner in placed:
            fake_quant.learner = learner.train()
        try:
            yield roundings, steps
        finally:
            for weight, learner in zip(chosen, roundings, strict=True):
                weight.write(learner.rounded(weight.blocks_input().shape))
            for fake_quant, learner in placed:
                fake_quant.set_qparams(learner.qparams())
                fake_quant.learner = None


def _learns(edge: FakeQuant) -> bool:
    slot = edge.slot
    static = edge.enabled and edge.scale.numel() > 0 and not slot.spec.dynamic
    return static and slot.quantizer.is_affine(slot.spec)


def _soft(model: nn.Module, weight: QuantizedWeight) -> SoftRounding:
    slot = weight.fake_quant.slot
    blocks = slot.granularity.to_blocks(weight.blocks_input())
    floats = slot.granularity.to_blocks(float_parameter(model, weight.module, "weight"))
    return SoftRounding(slot, weight.fake_quant.qparams(), blocks, floats)


class SoftRounding(LearnedRounding):
    """A weight between two neighbouring codes: scale * clip(base + h(v)), AdaRound's eq. 22.

    Args:
        start: scale and zero_point, [B, 1].
        weight: [B, N]; h starts on the side of the code it has now.
        floats: [B, N], the float weight, on whose side the other neighbour lies.
    """

    def __init__(self, slot: Slot, start: QParams, weight: Tensor, floats: Tensor) -> None:
        super().__init__(slot)
        self.low = slot.spec.quant_min - start.zero_point
        self.high = slot.spec.quant_max - start.zero_point
        self.zero_point = start.zero_point
        self.scale = nn.Parameter(start.scale.detach().clone())
        codes = (weight / start.scale).clamp(self.low, self.high).round()
        rest = floats / start.scale - codes
        goal = codes + torch.where(rest.abs() > 0.5, rest.clamp(-0.45, 0.45), rest)
        self.base = goal.floor()
        self.v = nn.Parameter(inverse_h((goal - self.base).clamp(0.001, 0.999)))

    def h(self) -> Tensor:
        """Return how far each weight is from its lower to its upper code."""
        return rectified(torch.sigmoid(self.v))

    def qparams(self) -> QParams:
        """Return the scale as it stands."""
        return QParams(self.scale, self.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """Return the weight in between, in the shape of x."""
        return self._weight(self.h(), x.shape)

    def rounded(self, shape: torch.Size) -> Tensor:
        """Return the weight on its codes."""
        return self._weight((self.h() > 0.5).float(), shape).detach()

    def _weight(self, h: Tensor, shape: torch.Size) -> Tensor:
        codes = torch.clamp(self.base + h, self.low, self.high)
        return self.slot.granularity.from_blocks(codes * self.scale, shape)


class DroppedStep(LearnedStep):
    """A learned step that leaves a random share of the elements as they are (QDrop, eq. 7).

    Args:
        drop: that share, while it trains.
    """

    def __init__(self, slot: Slot, start: QParams, drop: float) -> None:
        super().__init__(slot, start)
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        """Quantize what is not dropped."""
        return mixed(super().forward(x), x, self.drop if self.training else 0.0)


def mixed(x: Tensor, other: Tensor, share: float) -> Tensor:
    """Return x, and other for a random share of the elements."""
    return x if share == 0 else torch.where(torch.rand_like(x) < share, other, x)


def _biases(module: nn.Module) -> list[Tensor]:
    found = [m._parameters.get("bias") for m in quantized_layers(module)]
    return [bias for bias in found if bias is not None]


def _error(unit: Unit, fisher: Sequence[Tensor] | None) -> float:
    """Return the mean over the batches of the squared error a sample."""
    errors = [batch_error(unit, b, fisher, 0.0).item() for b in range(len(unit.calls))]
    return sum(errors) / len(errors)


def batch_error(unit: Unit, b: int, fisher: Sequence[Tensor] | None = None, drop: float = 0.0) -> Tensor:
    """Return the squared error of a unit's output on one batch, per sample, weighed by fisher."""
    args, kwargs = _mixed_calls(unit.calls[b], unit.float_calls[b], drop)
    output, target = _tensor(unit.module(*args, **kwargs)), _tensor(unit.targets[b])
    squares = (output - target).square()
    return (squares if fisher is None else squares * fisher[b]).sum() / len(target)


def _mixed_calls(call: Arguments, other: Arguments, share: float) -> Arguments:
    if share == 0:
        return call

    def mix(x: Any, y: Any) -> Any:  # noqa: ANN401
        real = isinstance(x, Tensor) and x.is_floating_point() and x.shape == y.shape
        return mixed(x, y, share) if real else x

    result: Arguments = pytree.tree_map(mix, call, other)
    return result


def _tensor(output: Any) -> Tensor:  # noqa: ANN401
    """Return the first floating-point tensor of what a module gave."""
    leaves = (leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))
    return next(leaf for leaf in leaves if leaf.is_floating_point())


@hookimpl
def qpipe_register_finetune() -> list[type[FinetuneStrategy]]:
    """Offer BRECQ."""
    return [BRECQ]
