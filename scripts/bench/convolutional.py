"""Two convolutional networks in W8A8 and two engines: qpipe's file beside the engine's own tool, same crops.

    python scripts/bench/convolutional.py                             # needs the extra openvino, and nncf
    python scripts/bench/convolutional.py --models resnet_digits --engines onnxruntime --recipes minmax

ONNX Runtime's own tool is quantize_static, OpenVINO's is NNCF, each with the setting named in its row. SQNR
is that of the logits to float32's; times are process CPU time of one thread in turns, an image, a turn being
long enough for the clock; speed is that beside the first row's, turn by turn. Bars: 0.97 of the own tool's
speed at batch 1 and 32, at equal or better SQNR; no convolution or addition in floating point.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from efficientnet import export_float, session, theirs
from torch import Tensor, nn

import qpipe

Run = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]
Open = Callable[[], Run]
RECIPES: dict[str, dict[str, Any]] = {
    "minmax": {},
    "percentile": {"calibrator": "percentile"},
    "minmax, bias_correction": {"finetune": ["bias_correction"]},
    "layer": {"granularity": "layer"},
    "layer, equalize, gptq": {  # experiment=w8_tensor_ptq
        "granularity": "layer",
        "transform": ["fold_bn", "equalize"],
        "finetune": [{"name": "gptq", "shrinkage": 0.2}],
    },
}
STATIC = ("minmax", "percentile")
TOOL = {  # of NNCF: preset, bias correction
    "performance": ("PERFORMANCE", True),
    "mixed": ("MIXED", True),
    "mixed, no bias correction": ("MIXED", False),
}
SIZES = (1, 32)
SECONDS = 0.04  # of calls between two looks at the clock: enough that a turn repeats within a few percent


def efficientnet(calibration: int, evaluation: int) -> tuple[nn.Module, Tensor, Tensor]:
    from qpipe_zoo.data.photos import Photos
    from qpipe_zoo.model.efficientnet_lite0 import efficientnet_lite0

    photos = Photos(num_calibration=calibration, num_evaluation=evaluation)
    photos.setup()
    parts = (torch.stack([*photos.datasets[part]]) for part in ("calibration", "evaluation"))
    return (efficientnet_lite0().eval(), *parts)


def resnet(calibration: int, evaluation: int) -> tuple[nn.Module, Tensor, Tensor]:
    from qpipe_zoo.data.digits import Digits
    from qpipe_zoo.model.resnet_digits import resnet_digits

    torch.manual_seed(0)  # the training set comes shuffled: the same digits each time
    digits = Digits()
    digits.setup()
    train, test = (
        torch.cat([batch[0] for batch in loader()])
        for loader in (digits.train_dataloader, digits.test_dataloader)
    )
    return resnet_digits().eval(), train[:calibration], test[:evaluation]


MODELS = {"efficientnet_lite0": efficientnet, "resnet_digits": resnet}


def in_onnxruntime(path: Path) -> tuple[Open, dict[str, int]]:
    def opened() -> Run:
        runtime = session(path)
        name = runtime.get_inputs()[0].name
        return lambda x: runtime.run(None, {name: x})[0]

    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        session(path, optimized)
        nodes = Counter(node.op_type for node in onnx.load(optimized).graph.node)
    floats = {kind: nodes[kind] + nodes[f"Fused{kind}"] for kind in ("Conv", "Add", "Gemm")}
    return opened, floats


def in_openvino(graph: Any) -> tuple[Open, dict[str, int]]:  # noqa: ANN401  # openvino.Model
    from qpipe_openvino._runtime import OpenVinoModule, compiled

    def opened() -> Run:
        executed = compiled(graph)
        return lambda x: executed([x])[0]

    module = OpenVinoModule(graph)
    floats = {
        name: count
        for name, count in module.executed().items()
        if name.split()[0] in ("Convolution", "Eltwise", "FullyConnected") and name.split()[1][0] == "f"
    }
    return opened, floats


def ours(model: nn.Module, crops: Tensor, engine: str, recipe: dict[str, Any], out: Path) -> tuple[Open, Any]:
    exporter = "onnx" if engine == "onnxruntime" else "openvino"
    _, report = qpipe.quantize(
        model,
        [*crops.split(16)],
        task=qpipe.Task(),
        out=out,
        evaluator=[],
        exporter=[{"name": exporter, "samples": 16, "compare_fp32": False}],
        **{"granularity": "channel", **recipe},
    )
    path = out / report.artifacts[0].path
    if engine == "onnxruntime":
        return in_onnxruntime(path)
    import openvino

    return in_openvino(openvino.Core().read_model(path.parent / "model.xml"))


def nncf(model: nn.Module, crops: Tensor, preset: str, correct: bool) -> tuple[Open, Any]:
    import nncf
    import openvino

    graph = openvino.convert_model(model, example_input=crops[:1])
    data = nncf.Dataset([crop.numpy() for crop in crops.split(1)])
    return in_openvino(
        nncf.quantize(
            graph,
            data,
            preset=getattr(nncf.QuantizationPreset, preset),
            subset_size=len(crops),
            advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=not correct),
        )
    )


def cpu_ms(made: dict[str, Open], crops: np.ndarray[Any, Any], rounds: int) -> dict[str, list[list[float]]]:
    """Return CPU milliseconds an image for each batch size, a figure a round; each begins elsewhere.

    Every third round opens the files anew: where their memory lies costs a call of 0.03 ms up to 5 %.
    """
    names = [*made]
    times: dict[str, list[list[float]]] = {name: [[] for _ in SIZES] for name in names}
    for turn in range(rounds):
        if turn % 3 == 0:
            runs = {name: made[name]() for name in names}
        for position, size in enumerate(SIZES):
            x = np.resize(crops, (size, *crops.shape[1:]))
            calls = max(2, math.ceil(SECONDS / seconds(runs[names[0]], x, 5)))
            for name in np.roll(names, turn):
                times[name][position].append(1e3 * seconds(runs[name], x, calls) / size)
    return times


def seconds(run: Run, x: np.ndarray[Any, Any], calls: int) -> float:
    """Return the process CPU time of a call, after one that prepares for the batch size."""
    run(x)
    start = time.process_time()
    for _ in range(calls):
        run(x)
    return (time.process_time() - start) / calls


def figures(times: list[list[float]], first: list[list[float]]) -> str:
    """Write the medians for each batch size, and the speed beside the first row's."""
    medians = " / ".join(f"{statistics.median(taken):.3g}" for taken in times)
    speed = (
        statistics.median(a / b for a, b in zip(other, taken, strict=True))
        for taken, other in zip(times, first, strict=True)
    )
    return f"{medians} | {' / '.join(f'{x:.2f}' for x in speed)}"


def rows(
    model: nn.Module, crops: Tensor, engine: str, recipes: list[str], folder: Path
) -> dict[str, tuple[Open, Any]]:
    made = {
        f"qpipe, {name}": ours(model, crops, engine, RECIPES[name], folder / name.replace(", ", "-"))
        for name in recipes
    }
    if engine == "openvino":
        return {f"NNCF, {name}": nncf(model, crops, *chosen) for name, chosen in TOOL.items()} | made
    path = folder / "fp32.onnx"
    export_float(model, crops, path)
    static = {f"quantize_static, {m}": in_onnxruntime(theirs(m, path, crops, folder)) for m in STATIC}
    return static | made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", default=[*MODELS], choices=[*MODELS])
    parser.add_argument("--engines", nargs="*", default=["onnxruntime", "openvino"])
    parser.add_argument("--recipes", nargs="*", default=[*RECIPES], choices=[*RECIPES], help="of qpipe")
    parser.add_argument("--calibration", type=int, default=32)
    parser.add_argument("--evaluation", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=21)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    print(
        "| model | engine | tool | SQNR dB | agreement | float conv, add, product | CPU ms b1 / b32 | speed |"
    )
    print("|---|---|---|--:|--:|---|--:|--:|")
    for name in chosen.models:
        model, calibration, evaluation = MODELS[name](chosen.calibration, chosen.evaluation)
        with torch.no_grad():
            reference = torch.cat([model(part) for part in evaluation.split(16)]).numpy()
        for engine in chosen.engines:
            with tempfile.TemporaryDirectory() as folder:
                made = rows(model, calibration, engine, chosen.recipes, Path(folder))
                times = cpu_ms(
                    {row: opened for row, (opened, _) in made.items()}, evaluation.numpy(), chosen.rounds
                )
                for row, (opened, floats) in made.items():
                    run = opened()
                    logits = np.concatenate([run(part.numpy()) for part in evaluation.split(16)])
                    sqnr = 10 * np.log10(np.square(reference).sum() / np.square(logits - reference).sum())
                    same = (logits.argmax(1) == reference.argmax(1)).mean()
                    speed = figures(times[row], times[next(iter(made))])
                    left = sum(floats.values())
                    print(
                        f"| {name} | {engine} | {row} | {sqnr:.2f} | {same:.3f} | {left} | {speed} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
