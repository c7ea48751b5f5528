"""Walk a prepared model layer by layer: what reaches each layer, and what it should give back."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from qpipe import Entry, QpipeError, RecipeError, Shelf, calibration_batches, shared
from qpipe.heap import frugal, release
from qpipe.nn import FakeQuant, QuantizedWeight, disabled, weight_quantizers
from qpipe_methods.memory import to_disk

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule

    from qpipe import Task

log = logging.getLogger("qpipe")
_FLOATS: WeakKeyDictionary[nn.Module, dict[nn.Module, dict[str, nn.Parameter | None]]] = WeakKeyDictionary()
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Unit:
    """A module of one or more quantized layers as it is reached.

    Args:
        name: its path.
        calls: the arguments the quantized model so far feeds it, those of a batch each.
        float_calls: the arguments it has in the float model.
        targets: what the float module returns in the float model.
    """

    name: str
    module: nn.Module
    calls: Sequence[Arguments]
    float_calls: Sequence[Arguments]
    targets: Sequence[Any]


@dataclass
class Layer:
    """A quantized layer as it is reached.

    Args:
        name: its path.
        inputs: what the quantized model so far feeds it, a tensor a batch.
        targets: what the float layer returns in the float model, a tensor a batch.
    """

    name: str
    module: nn.Module
    fake_quant: FakeQuant
    inputs: Sequence[Tensor]
    targets: Sequence[Tensor]

    @property
    def weight(self) -> Tensor:
        """The float parameter [O, *]."""
        return parameter(self.module, "weight")


def parameter(module: nn.Module, name: str) -> Tensor:
    """Return a parameter as it is stored, not as its quantizer shows it; detached, it may be written to."""
    value = module._parameters[name]
    if value is None:
        raise QpipeError(f"{type(module).__name__} has no parameter '{name}'")
    return value.detach()


def reconstruct(
    model: nn.Module,
    data: LightningDataModule,
    task: Task,
    improve: Callable[[Layer], None],
    *,
    num_samples: int = 128,
    memory_gb: float = 4.0,
    title: str = "reconstruct",
    shelf: Shelf | None = None,
) -> None:
    """Improve every quantized linear and convolutional layer in order of execution, each once.

    Args:
        improve: changes the layer's parameters or qparams in place.
        num_samples: of the calibration set.
        memory_gb: for activations; fewer batches are read where they would not fit, and that is logged.
        shelf: keeps each layer as it was improved, so that a killed run goes on where it was.

    Raises:
        RecipeError: not even one batch fits.
        QpipeError: batches take different ways through the model.
    """
    quantizers = quantized_layers(model)

    def as_layer(unit: Unit) -> None:
        inputs = [args[0] for args, _ in unit.calls]
        unit.float_calls = ()  # nobody reads them here: their memory goes
        improve(Layer(unit.name, unit.module, quantizers[unit.module], inputs, unit.targets))

    names = {module: name for name, module in model.named_modules() if module in quantizers}
    walk(
        model,
        data,
        task,
        names,
        as_layer,
        num_samples=num_samples,
        memory_gb=memory_gb,
        title=title,
        shelf=shelf,
    )


def quantized_layers(model: nn.Module) -> dict[nn.Module, FakeQuant]:
    """Return the linear and convolutional layers whose weight is quantized, with its quantizer."""
    layers = filter(is_layer, weight_quantizers(model))
    return {w.module: w.fake_quant for w in layers if w.fake_quant.calibrated}


def walk(
    model: nn.Module,
    data: LightningDataModule,
    task: Task,
    units: Mapping[nn.Module, str],
    improve: Callable[[Unit], None],
    *,
    num_samples: int = 128,
    memory_gb: float = 4.0,
    title: str = "reconstruct",
    shelf: Shelf | None = None,
) -> None:
    """Improve modules of a prepared model in order of execution, each once.

    Each batch runs through the quantized and through the float model, all of them halted at the same module;
    one is improved on what the modules before it, already improved, feed it. Nothing is run twice.

    Args:
        units: modules, none inside another, and what they are called.
        improve: changes the module's parameters or qparams in place.
        num_samples, memory_gb, shelf: as for reconstruct.

    Raises:
        RecipeError: not even one batch fits.
        QpipeError: batches take different ways through the model.
    """
    device = next(model.parameters()).device
    inputs = [task.inputs(_to(batch, device)) for batch in calibration_batches(data, num_samples)]
    was_training = model.training
    with torch.no_grad(), ExitStack() as stack:
        stack.callback(model.train, was_training)
        model.eval()
        layers = list(quantized_layers(model))
        stack.enter_context(frugal(model))
        inputs = _fitting(model, inputs, layers, memory_gb)
        floats, quants = (_start(model, inputs, stack) for _ in range(2))
        for module in units:
            stack.callback(module.register_forward_pre_hook(_arrive, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(_leave).remove)
        _walk(model, units, floats, quants, _remembered(improve, shelf or Shelf()), title)


def is_layer(weight: QuantizedWeight) -> bool:
    """Say whether it is the weight of a linear or convolutional layer, and quantized."""
    is_weight = isinstance(weight.module, _LAYERS) and weight.parameter_name == "weight"
    return is_weight and weight.fake_quant.enabled


def _remembered(improve: Callable[[Unit], None], shelf: Shelf) -> Callable[[Unit], None]:
    """Improve a unit, or give it the state it had when it was improved before."""

    def improve_once(unit: Unit) -> None:
        entry = shelf.get(unit.name)
        if entry is not None:
            _restore(unit.module, entry.tensors)
            return
        improve(unit)
        if shelf.store:
            shelf.put(unit.name, Entry(unit.module.state_dict()))

    return improve_once


def _restore(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state into a module; it may hold biases that the module lacks."""
    for name, value in state.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if leaf in owner._parameters and owner._parameters[leaf] is None:
            owner._parameters[leaf] = nn.Parameter(torch.empty_like(value))
    module.load_state_dict(state)


def _walk(
    model: nn.Module,
    units: Mapping[nn.Module, str],
    floats: list[_Walker],
    quants: list[_Walker],
    improve: Callable[[Unit], None],
    title: str,
) -> None:
    start, done = time.perf_counter(), 0
    layers = quantized_layers(model)
    with _float(model, layers):
        _advance(floats)
    while (module := _advance(quants)) is not None:
        improve(_reached(model, layers, units[module], module, floats, quants))
        for layer in layers.keys() & {*module.modules()}:
            if (weight := layer._parameters["weight"]) is not None:
                to_disk(weight)
        done += 1
        spent = time.perf_counter() - start
        left = spent / done * (len(units) - done)
        log.info(
            "%s: %s (%d of %d), %.0f s, about %.0f s left",
            title,
            units[module],
            done,
            len(units),
            spent,
            left,
        )
    for module, name in units.items():
        if module not in quants[0].visited:
            log.warning("%s: '%s' is not called as a layer and stays as it is", title, name)


def _reached(
    model: nn.Module,
    layers: Iterable[nn.Module],
    name: str,
    module: nn.Module,
    floats: Sequence[_Walker],
    quants: Sequence[_Walker],
) -> Unit:
    """Run the float model past a module at which all walkers are halted; return what is known of it then."""
    calls, float_calls = [w.call_at for w in quants], [w.call_at for w in floats]
    with _float(model, layers):
        _advance(floats)
    release(model)
    return Unit(name, module, calls, float_calls, [w.left(module) for w in floats])


def float_parameter(model: nn.Module, module: nn.Module, name: str) -> Tensor:
    """Return a parameter as it was before the first strategy changed it."""
    now = parameter(module, name)
    before = _FLOATS.get(model, {}).get(module, {}).get(name)
    return now if before is None else before.detach()


def sensitivity(
    model: nn.Module,
    data: LightningDataModule,
    task: Task,
    units: Iterable[nn.Module],
    num_samples: int,
) -> dict[nn.Module, list[Tensor]]:
    """Return how much the float network's output error grows with that of each unit's output.

    It is the diagonal of J'J, J the derivative of the network's output by the unit's, by one random sign
    vector a sample (Hutchinson): for each unit a tensor a batch, the mean over its samples, and that of all
    elements 1.

    Source: Li et al., 2021, arXiv 2102.05426, eq. 9, for the squared error of the output in the task's place.
    """
    found: dict[nn.Module, list[Tensor]] = {unit: [] for unit in units}
    signs = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    with _float(model, list(quantized_layers(model))), torch.enable_grad(), ExitStack() as stack:
        seen: dict[nn.Module, Tensor] = {}
        for unit in found:
            stack.callback(unit.register_forward_hook(_keeping(seen)).remove)
        for batch in calibration_batches(data, num_samples):
            args, kwargs = task.inputs(_to(batch, device))
            output = task.compared(model(*args, **kwargs))
            sign = torch.randint(0, 2, output.shape, generator=signs).to(output) * 2 - 1
            grads = torch.autograd.grad((output * sign).sum(), [*seen.values()])
            for unit, grad in zip(seen, grads, strict=True):
                square = grad.square().mean(0, keepdim=True)
                found[unit].append(square / square.mean().clamp(min=1e-30))
            seen.clear()
    return found


def _keeping(seen: dict[nn.Module, Tensor]) -> Callable[..., None]:
    def keep(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ANN401
        seen[module] = next(x for x in torch.utils._pytree.tree_leaves(output) if isinstance(x, Tensor))

    return keep


@contextmanager
def _float(model: nn.Module, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Compute what the float model did before the first strategy changed it."""
    if model not in _FLOATS:
        _FLOATS[model] = {module: _copies(module) for module in modules}
    floats = _FLOATS[model]
    now = {module: dict(module._parameters) for module in floats}
    try:
        for module, parameters in floats.items():
            module._parameters.update(parameters)
        with disabled(model):
            yield
    finally:
        for module, parameters in now.items():
            module._parameters.update(parameters)


def _copies(module: nn.Module) -> dict[str, nn.Parameter | None]:
    parameters = module._parameters.items()
    return {name: None if p is None else nn.Parameter(shared(p)) for name, p in parameters}


def _advance(walkers: Sequence[_Walker]) -> nn.Module | None:
    halted = {walker.advance() for walker in walkers}
    if len(halted) > 1:
        raise QpipeError("batches take different ways through the model; reconstruct with data of one kind")
    return halted.pop()


def _start(model: nn.Module, inputs: Sequence[Any], stack: ExitStack) -> list[_Walker]:
    walkers = [_Walker(model, args, kwargs) for args, kwargs in inputs]
    for walker in walkers:
        stack.callback(walker.stop)
    return walkers


class _Stopped(BaseException):
    """Ends a walker that is no longer needed."""


class _Walker(threading.Thread):
    """One batch on its way through the model, halted at the layer it is about to enter.

    Exactly one thread runs at any time: the walker that was told to advance, or its owner.
    """

    def __init__(self, model: nn.Module, args: Any, kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(daemon=True)
        self.model, self.call = model, (args, kwargs)
        self.call_at: Arguments = ((), {})
        self.go, self.halted = threading.Semaphore(0), threading.Semaphore(0)
        self.visited: set[nn.Module] = set()
        self.at: nn.Module | None = None
        self.output: Any = None
        self.output_of: nn.Module | None = None
        self.error: BaseException | None = None
        self.stopping = False

    def run(self) -> None:
        """Run the model, from one halt to the next."""
        self.go.acquire()
        try:
            with torch.no_grad():
                self.model(*self.call[0], **self.call[1])
        except _Stopped:
            pass
        except BaseException as error:  # raised again where advance() was called
            self.error = error
        self.at, self.call_at = None, ((), {})
        self.halted.release()

    def advance(self) -> nn.Module | None:
        """Run to the next layer and return it, None at the end."""
        if not self.is_alive() and self.ident is None:
            self.start()
        elif self.at is None:
            return None
        self.go.release()
        self.halted.acquire()
        if self.error is not None:
            raise self.error
        return self.at

    def arrive(self, module: nn.Module, call: Arguments) -> None:
        """Halt before a module, the first time it is reached."""
        if module in self.visited:
            return
        self.visited.add(module)
        self.at, self.call_at = module, call
        self.halted.release()
        self.go.acquire()
        if self.stopping:
            raise _Stopped

    def left(self, module: nn.Module) -> Any:  # noqa: ANN401  # whatever the module returns
        """Return what the module gave that was left last, and let go of it."""
        if self.output_of is not module:
            raise QpipeError("the float and the quantized model take different ways through the layers")
        output, self.output = self.output, None
        return output

    def stop(self) -> None:
        """End the thread."""
        self.stopping = True
        if self.is_alive():
            self.go.release()
            self.join()


def _arrive(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    walker = threading.current_thread()
    if isinstance(walker, _Walker):
        walker.arrive(module, (args, kwargs))


def _leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401
    walker = threading.current_thread()
    if isinstance(walker, _Walker) and walker.at is module:
        walker.output, walker.output_of = output, module


def _to(batch: Any, device: torch.device) -> Any:  # noqa: ANN401
    return torch.utils._pytree.tree_map_only(Tensor, lambda x: x.to(device), batch)


def _fitting(
    model: nn.Module, inputs: list[Any], modules: Sequence[nn.Module], memory_gb: float
) -> list[Any]:
    """Return the batches whose activations fit: two streams, each an input, an output and a shortcut."""
    with _largest_activation(modules) as sizes:
        args, kwargs = inputs[0]
        with disabled(model):
            model(*args, **kwargs)
    fit = int(memory_gb * 2**30 / (3 * 2 * max(sizes, default=1)))
    if fit == 0:
        raise RecipeError(
            f"one batch needs {6 * max(sizes) / 2**30:.1f} GiB of activations, memory_gb={memory_gb}; "
            "raise it or lower data.batch_size"
        )
    if fit < len(inputs):
        log.warning("memory_gb=%s: %d of %d batches are read", memory_gb, fit, len(inputs))
    return inputs[:fit]


@contextmanager
def _largest_activation(modules: Sequence[nn.Module]) -> Iterator[list[int]]:
    sizes: list[int] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        sizes.append(max(x.numel() * x.element_size() for x in (args[0], output)))

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(note).remove)
        yield sizes
