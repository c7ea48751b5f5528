"""How long ONNX Runtime takes for each operation of a file, and which layer it belongs to."""

from __future__ import annotations

import ast
import json
import time
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qpipe import Operation
from qpipe.cache import digest
from qpipe.calls import Call, tensors
from qpipe_onnx._nodes import name_of
from qpipe_onnx._runtime import DERIVED, session
from qpipe_onnx._weights import weight_of

_SCOPES = "pkg.torch.onnx.name_scopes"  # of a traced node: the modules it is called in, then its own name
_TIMED = "_kernel_time"
_ROUNDS, _SECONDS = 30, 4.0  # rounds at most; but three, however long they take


def scopes(graph: ir.Model) -> dict[str, str]:
    """Return the path of the module that computes each value, as long as the tracer's notes are there."""
    return {
        name_of(value): ast.literal_eval(notes)[-2]
        for node in graph.graph
        if (notes := node.metadata_props.get(_SCOPES)) is not None
        for value in node.outputs
    }


def timed(
    path: Path, owners: Mapping[str, str], call: Call, accuracy_level: int, folder: Path
) -> list[Operation]:
    """Run a file and return its operations; what is spent between them is not in it.

    Args:
        owners: layers by the names of nodes and values.
        folder: for what ONNX Runtime writes.
    """
    optimized, profile = folder / "optimized.onnx", folder / "profile"
    runtime = session(path, optimized=optimized, accuracy_level=accuracy_level, profile=profile)
    feed = {value.name: x.numpy() for value, x in zip(runtime.get_inputs(), tensors(call), strict=True)}
    rounds, stop = 0, time.perf_counter() + _SECONDS
    while rounds < 3 or (rounds < _ROUNDS and time.perf_counter() < stop):
        runtime.run(None, feed)
        rounds += 1
    nodes = _nodes(optimized, owners)
    found = []
    for name, calls in _events(Path(runtime.end_profiling())).items():
        about = calls[0]["args"]
        layer, constants = nodes.get(name, ("", None))
        kernel = f"{about['op_name']} {digest(constants, about['output_type_shape'])}"
        found.append(Operation(layer, kernel, min(call["dur"] for call in calls) * len(calls) // rounds))
    return found


def owners(graph: ir.Model, modules: Mapping[str, str], layers: Collection[str]) -> dict[str, str]:
    """Return the layer of each node and value by name: the one that computes it, or whose output it follows.

    Args:
        modules: of scopes; what was rewritten since is known by its weight.
    """
    found: dict[str, str] = {}
    for node in graph.graph:
        paths = [modules.get(name_of(value), "") for value in node.outputs]
        paths += [weight.name for value in node.inputs if (weight := weight_of(value)) is not None]
        paths += [name_of(value) for value in node.inputs if value is not None and value.is_initializer()]
        before = (found[name] for value in node.inputs if (name := name_of(value)) in found)
        own = next((layer for path in paths if (layer := _layer(path, layers))), None) or next(before, "")
        found |= dict.fromkeys([str(node.name), *map(name_of, node.outputs)], own)
    return found


def _layer(path: str, layers: Collection[str]) -> str:
    """Return the innermost layer that a path leads to or through."""
    inside = [layer for layer in layers if path == layer or path.startswith(f"{layer}.")]
    return max(inside, key=len, default="")


def _events(profile: Path) -> dict[str, list[dict[str, Any]]]:
    """Return what was noted of each node, call by call."""
    found = defaultdict(list)
    for event in json.loads(profile.read_text()):
        if event.get("cat") == "Node" and event["name"].endswith(_TIMED):
            found[event["name"].removesuffix(_TIMED)].append(event)
    return found


def _nodes(optimized: Path, owners: Mapping[str, str]) -> dict[str, tuple[str, Any]]:
    """Return of each executed node its layer, and its options with types and shapes of its constants.

    What ONNX Runtime put in (a change of layout, say) belongs to the layer it follows.
    """
    import onnx

    graph = onnx.load(optimized, load_external_data=False).graph
    stored = {value.name: (value.data_type, [*value.dims]) for value in graph.initializer}
    found: dict[str, tuple[str, Any]] = {}
    layers: dict[str, str] = {}
    for node in graph.node:
        layer = owners.get(DERIVED.split(node.name)[0]) or next(
            (layers[name] for name in node.input if name in layers), ""
        )
        layers |= dict.fromkeys(node.output, layer)
        options = sorted(map(str, node.attribute))
        found[node.name] = layer, (options, [stored.get(name) for name in node.input])
    return found
