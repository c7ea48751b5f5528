"""Walk a prepared model layer by layer: what reaches each layer, and what it should give back."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from qpipe import QpipeError, RecipeError, calibration_batches
from qpipe.nn import FakeQuant, QuantizedWeight, disabled, weight_quantizers

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule

    from qpipe import Task

log = logging.getLogger("qpipe")
_FLOATS: WeakKeyDictionary[nn.Module, dict[nn.Module, dict[str, nn.Parameter | None]]] = WeakKeyDictionary()
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


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
) -> None:
    """Improve every quantized linear and convolutional layer in order of execution, each once.

    Each batch runs through the quantized and through the float model, all of them halted at the same layer;
    a layer is improved on what the layers before it, already improved, feed it. Nothing is run twice.

    Args:
        improve: changes the layer's parameters or qparams in place.
        num_samples: of the calibration set.
        memory_gb: for activations; fewer batches are read where they would not fit, and that is logged.

    Raises:
        RecipeError: not even one batch fits.
        QpipeError: batches take different ways through the model.
    """
    watched = {w.module: w for w in weight_quantizers(model) if _is_layer(w)}
    device = next(model.parameters()).device
    inputs = [task.inputs(_to(batch, device)) for batch in calibration_batches(data, num_samples)]
    was_training = model.training
    with torch.no_grad(), ExitStack() as stack:
        stack.callback(model.train, was_training)
        model.eval()
        inputs = _fitting(model, inputs, list(watched), memory_gb)
        floats, quants = (_start(model, inputs, stack) for _ in range(2))
        for module in watched:
            stack.callback(module.register_forward_pre_hook(_arrive).remove)
            stack.callback(module.register_forward_hook(_leave).remove)
        _walk(model, watched, floats, quants, improve, title)


def _is_layer(weight: QuantizedWeight) -> bool:
    enabled = weight.fake_quant.enabled and weight.fake_quant.calibrated
    return isinstance(weight.module, _LAYERS) and weight.parameter_name == "weight" and enabled


def _walk(
    model: nn.Module,
    watched: dict[nn.Module, QuantizedWeight],
    floats: list[_Walker],
    quants: list[_Walker],
    improve: Callable[[Layer], None],
    title: str,
) -> None:
    start, done = time.perf_counter(), 0
    with _float(model, watched):
        _advance(floats)
    while (module := _advance(quants)) is not None:
        with _float(model, watched):
            _advance(floats)
        weight = watched[module]
        name = weight.name.rpartition(":")[0]
        inputs, targets = [w.input for w in quants], [w.left(module) for w in floats]
        improve(Layer(name, module, weight.fake_quant, inputs, targets))
        done += 1
        spent = time.perf_counter() - start
        left = spent / done * (len(watched) - done)
        log.info("%s: %s (%d of %d), %.0f s, about %.0f s left", title, name, done, len(watched), spent, left)
    for module, weight in watched.items():
        if module not in quants[0].visited:
            log.warning("%s: '%s' is not called as a layer and stays as it is", title, weight.name)


@contextmanager
def _float(model: nn.Module, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Compute what the float model did before the first strategy changed it."""
    floats = _FLOATS.setdefault(model, {module: _copies(module) for module in modules})
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
    return {name: None if p is None else nn.Parameter(p.detach().clone()) for name, p in parameters}


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
        self.go, self.halted = threading.Semaphore(0), threading.Semaphore(0)
        self.visited: set[nn.Module] = set()
        self.at: nn.Module | None = None
        self.input = self.output = torch.empty(0)
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
        self.at, self.input = None, torch.empty(0)
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

    def arrive(self, module: nn.Module, x: Tensor) -> None:
        """Halt before a layer, the first time it is reached."""
        if module in self.visited:
            return
        self.visited.add(module)
        self.at, self.input = module, x
        self.halted.release()
        self.go.acquire()
        if self.stopping:
            raise _Stopped

    def left(self, module: nn.Module) -> Tensor:
        """Return what the layer gave that was left last, and let go of it."""
        if self.output_of is not module:
            raise QpipeError("the float and the quantized model take different ways through the layers")
        output, self.output = self.output, torch.empty(0)
        return output

    def stop(self) -> None:
        """End the thread."""
        self.stopping = True
        if self.is_alive():
            self.go.release()
            self.join()


def _arrive(module: nn.Module, args: tuple[Any, ...]) -> None:
    walker = threading.current_thread()
    if isinstance(walker, _Walker):
        walker.arrive(module, args[0])


def _leave(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
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
