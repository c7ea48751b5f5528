"""What each width of each layer takes in the file that an engine executes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

from torch import distributed, nn

from qpipe import Entry, Exporter, Operation, Recipe, Shelf
from qpipe.calls import Call, some_samples, tensors
from qpipe.identity import code_version, machine, model_digest
from qpipe.nn import disabled, weight_quantizers
from qpipe_methods.sensitivity import FLOAT_BITS, Candidates, Progress, kept

Operations = Sequence[Operation]


def timing(recipe: Recipe) -> Exporter | None:
    """Return the first exporter whose engine says how long its operations take."""
    every = (e for e in recipe.exporters if type(e).operations is not Exporter.operations)
    return next(every, None)


def microseconds(
    found: Sequence[Candidates], model: nn.Module, call: Call, recipe: Recipe
) -> tuple[list[list[int]], int, int]:
    """Return what each choice of each layer takes for one sample, the rest of the file, and the float model.

    The whole model is executed, all layers having one width; an operation belongs to a layer, or to the
    layer it follows. Equal kernels, of whatever layer and width, get one price: the least that was seen.
    """
    exporter, call = timing(recipe), some_samples(call, 1)
    assert exporter is not None  # noqa: S101  # refused by check
    layers = {_path(w.name): _path(w.fake_quant.name) for w in weight_quantizers(model)}
    shapes = [(str(x.dtype), [*x.shape]) for x in tensors(call)]
    parts = (code_version(), machine(), model_digest(model), exporter, shapes)
    shelf = Shelf(recipe.shelf.store, "latency", parts, taken=recipe.shelf.taken)
    widths = sorted({choice.num_bits for each in found for choice in each.choices} - {FLOAT_BITS})
    progress = Progress(f"latency in {exporter.name}", len(widths) + 1)

    def executed(width: int) -> Operations:
        with kept([fake_quant for each in found for fake_quant in each.fake_quants]):
            for each in found:
                min(each.choices, key=lambda choice: abs(choice.num_bits - width)).put()
            return exporter.operations(model, call, [*layers])

    def remembered(width: int) -> Operations:
        if (entry := shelf.get(width)) is None:
            entry = Entry(data=[asdict(operation) for operation in executed(width)])
            shelf.put(width, entry)
        progress.step(f"{width} bits")
        return _agreed([Operation(**fields) for fields in entry.data])

    with disabled(model):
        files = {FLOAT_BITS: remembered(FLOAT_BITS)}
    files |= by_width(widths, remembered)
    return priced(found, files, layers)


def _path(weight: str) -> str:
    return weight.rpartition(":")[0]


def _agreed(operations: Operations) -> Operations:
    """Return what the first process measured, so that all of them choose alike."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return operations
    said = [operations]
    distributed.broadcast_object_list(said)
    return said[0]


def by_width(widths: Sequence[int], executed: Callable[[int], Operations]) -> dict[int, Operations]:
    """Return what is executed at each width, narrowest first.

    Widths between two of equal kernels are stored like them, and not executed.
    """
    files = {width: executed(width) for width in dict.fromkeys((widths[0], widths[-1]))}
    pending = [(0, len(widths) - 1)]
    while pending:
        low, high = pending.pop()
        if kernels(files[widths[low]]) == kernels(files[widths[high]]):
            files |= dict.fromkeys(widths[low:high], files[widths[low]])
        elif high - low > 1:
            middle = (low + high) // 2
            files[widths[middle]] = executed(widths[middle])
            pending += [(low, middle), (middle, high)]
    return files


def kernels(operations: Operations) -> list[tuple[str, str]]:
    """Return what is executed, by layer; where it is equal, so are times."""
    return sorted((operation.layer, operation.kernel) for operation in operations)


def priced(
    found: Sequence[Candidates], files: Mapping[int, Operations], layers: Mapping[str, str]
) -> tuple[list[list[int]], int, int]:
    """Return costs, the rest and the whole of microseconds().

    Args:
        files: what is executed at each width.
        layers: the path of the candidates by that of each module whose weights they hold.
    """
    least: dict[str, int] = {}
    for operation in (operation for file in files.values() for operation in file):
        seen = least.get(operation.kernel, operation.microseconds)
        least[operation.kernel] = min(operation.microseconds, seen)
    sums = {width: _by_candidate(file, least, layers) for width, file in files.items()}
    costs = [[sums[choice.num_bits].get(each.path, 0) for choice in each.choices] for each in found]
    rest = max(sums[choice.num_bits].get(None, 0) for each in found for choice in each.choices)
    return costs, rest, sum(sums[FLOAT_BITS].values())


def _by_candidate(
    operations: Operations, prices: Mapping[str, int], layers: Mapping[str, str]
) -> Counter[str | None]:
    """Add up prices by the path of the candidate; None has what belongs to none."""
    sums: Counter[str | None] = Counter()
    for operation in operations:
        sums[layers.get(operation.layer)] += prices[operation.kernel]
    return sums
