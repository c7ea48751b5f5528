"""Errors of our methods beside those of other packages' code for the same methods, on the same layers.

    pip install llmcompressor==0.14.0.1 auto-round==0.16.1 hqq==0.2.8.post1 brevitas==0.13.4   # or some
    pip install bokeh jsonschema && pip install --no-deps aimet-torch==2.42.0
    python scripts/bench/independent.py

What reaches the layers in floating point, on 64 sentences (MiniLM) or 16 crops (EfficientNet-Lite0), and the
same weights, for both. Methods that round: one block's linear layers without biases; the squared error of
their outputs over that of our rounding to nearest; for HQQ the sum of the weights' errors to the power 0.7,
which is what it lowers. Transforms: a norm and the linear layer that reads it, or the three convolutions of a
block with ReLU between; what either package's code makes of them is rounded by the same recipe, and its error
is over that without the transform. One thread.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any
from unittest.mock import MagicMock, patch

import torch
from decoder_peers import hqq_weight
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule

CHANNEL = {"num_bits": 4}
GROUPS = {"num_bits": 4, "granularity": {"name": "subchannel", "group_size": 64}}
UNSIGNED = {"symmetric": False, "signed": False, "restricted": False}
SIXTEEN = {"restricted": False}  # levels: 4-bit symmetric codes of llm-compressor begin at -8
Cases = dict[str, tuple[nn.Sequential, Tensor]]


def recorded(model: nn.Module, data: LightningDataModule, count: int, names: Iterable[str]) -> list[Tensor]:
    """Return what reaches the modules of these names, images [count, C, H, W] or tokens [N, C]."""
    from qpipe import Task, calibration_batches

    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    for name, found in seen.items():
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, f=found: f.append(args[0]))
    with torch.no_grad():
        for args, kwargs in map(Task().inputs, calibration_batches(data, count)):
            model(*args, **kwargs)
    return [torch.cat([x if x.dim() == 4 else x.flatten(0, -2) for x in found]) for found in seen.values()]


def linear_layers() -> Cases:
    """Return the linear layers of a block of MiniLM without biases."""
    from qpipe_zoo.data.sentences import Sentences
    from qpipe_zoo.model.minilm import minilm

    model = minilm()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layer.3." in n}
    seen = recorded(model, Sentences(num_calibration=64), 64, layers)
    return {name: (alone(layers[name].weight), x) for name, x in zip(layers, seen, strict=True)}


def norms() -> Cases:
    """Return of three blocks of MiniLM the norm after attention and the linear layer that reads it."""
    from qpipe_zoo.data.sentences import Sentences
    from qpipe_zoo.model.minilm import minilm

    model, cases = minilm(), {}
    blocks = [name for name, _ in model.named_modules() if name.endswith(("layer.1", "layer.3", "layer.5"))]
    seen = recorded(
        model, Sentences(num_calibration=64), 64, [f"{name}.attention.output.LayerNorm" for name in blocks]
    )
    for name, x in zip(blocks, seen, strict=True):
        block: Any = copy.deepcopy(model.get_submodule(name))
        cases[name] = (nn.Sequential(block.attention.output.LayerNorm, block.intermediate.dense), x)
    return cases


def inverted_residuals() -> Cases:
    """Return the convolutions of three blocks, batch norm folded, ReLU for ReLU6."""
    from qpipe_zoo.data.photos import Photos
    from qpipe_zoo.model.efficientnet_lite0 import efficientnet_lite0

    names = [f"blocks.{i}" for i in (2, 4, 9)]
    model, cases = efficientnet_lite0(), {}
    for name, x in zip(names, recorded(model, Photos(num_calibration=16), 16, names), strict=True):
        block: Any = model.get_submodule(name)
        convs = [
            fuse_conv_bn_eval(part.conv, part.bn) for part in (block.expand, block.depthwise, block.project)
        ]
        cases[name] = (nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2]).eval(), x)
    return cases


def alone(weight: Tensor) -> nn.Sequential:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data.copy_(weight)
    return nn.Sequential(layer)


def ours(model: nn.Sequential, x: Tensor, recipe: Mapping[str, Any]) -> nn.Module:
    """Return what a recipe makes of a copy of the model."""
    from qpipe import quantize

    choices: dict[str, Any] = {
        "activation": None, "transform": [], "finetune": [], "evaluator": [], "target": "generic", **recipe
    }  # fmt: skip
    choices["finetune"] = [{**strategy, "num_samples": len(x)} for strategy in choices["finetune"]]
    batches = [*x.split(512 if x.dim() == 2 else 4)]
    return quantize(copy.deepcopy(model), batches, num_samples=len(x), **choices)[0]


def gptq_llmcompressor(module: nn.Linear, x: Tensor, group: int) -> Tensor:
    from compressed_tensors.quantization import ActivationOrdering, QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    weight = module.weight.detach()
    grouped = group < weight.shape[1]
    args = QuantizationArgs(
        num_bits=4, symmetric=True, strategy="group" if grouped else "channel",
        group_size=group if grouped else None, actorder=ActivationOrdering.WEIGHT if grouped else None,
    )  # fmt: skip
    scale = weight.reshape(len(weight), -1, group).abs().amax(2) / 7.5  # codes -8 to 7, as its observers do
    hessian = x.T @ x / len(x)
    found, _, fell_back = quantize_weight(
        weight[None].clone(), hessian[None].clone(), scale[None], torch.zeros_like(scale)[None], None, args
    )
    assert not fell_back.any()
    result: Tensor = found[0]
    return result


def adaround_brevitas(module: nn.Linear, x: Tensor, iterations: int) -> Tensor:
    from brevitas.inject.enum import LearnedRoundImplType
    from brevitas.nn import QuantLinear
    from brevitas.quant import Int8WeightPerChannelFloat
    from brevitas_examples.common.learned_round import learned_round_method as method

    weight = module.weight.detach()
    layer = QuantLinear(
        module.in_features, module.out_features, bias=False,
        weight_quant=Int8WeightPerChannelFloat, weight_bit_width=4,
    )  # fmt: skip
    layer.weight.data.copy_(weight)
    shape = {"learned_round_zeta": 1.1, "learned_round_gamma": -0.1}
    method.insert_learned_round_quantizers(layer, LearnedRoundImplType.HARD_SIGMOID, **shape)
    (rounding,) = method.return_learned_round_quantizers(layer)
    penalty = method.RoundRegularisationLoss(layer, max_count=iterations)
    error = method.MSELoss(layer, reduction="none", dim=1)
    optimizer, target = torch.optim.Adam(rounding.parameters(), lr=1e-2), x @ weight.T
    layer.train()
    for _ in range(iterations):
        optimizer.zero_grad()
        pred = layer(x)
        (error(pred, target) + penalty(pred, target)).backward()
        optimizer.step()
    layer.eval()
    result: Tensor = layer.quant_weight().value.detach()
    return result


def autoround(module: nn.Linear, x: Tensor, iterations: int) -> Tensor:
    from auto_round.algorithms.quantization.sign_round.sign_sgd import SignSGD
    from auto_round.wrapper import WrapperLinear

    twin: Any = copy.deepcopy(module)
    vars(twin).update(
        bits=4, group_size=64, sym=False, data_type="int", act_bits=16, scale_dtype=torch.float32
    )
    wrapper = WrapperLinear(twin, enable_torch_compile=False)
    groups = [{"params": [wrapper.params[key]]} for key in ("value", "min_scale", "max_scale")]
    optimizer = SignSGD(groups, lr=1 / iterations, weight_decay=0)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, iterations)
    target, least, best = x @ module.weight.detach().T, float("inf"), module.weight.detach()
    for _ in range(iterations):
        rounded = wrapper._qdq_weight(wrapper.value, wrapper.min_scale, wrapper.max_scale)[0]
        loss = (x @ rounded.T - target).square().mean()
        if loss.item() < least:
            least, best = loss.item(), rounded.detach().clone()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        falling.step()
    return best


def bias_correction_brevitas(model: nn.Sequential, x: Tensor) -> nn.Module:
    from brevitas.graph.calibrate import bias_correction_mode
    from brevitas.nn import QuantLinear
    from brevitas.quant import Int8WeightPerChannelFloat

    (module,) = model
    layer = QuantLinear(
        module.in_features, module.out_features, bias=False,
        weight_quant=Int8WeightPerChannelFloat, weight_bit_width=4,
    ).eval()  # fmt: skip
    layer.weight.data.copy_(module.weight)
    with torch.no_grad(), bias_correction_mode(layer):
        layer(x)
    return layer


def seqmse_aimet(module: nn.Linear, x: Tensor) -> Tensor:
    stub = MagicMock(__spec__=ModuleSpec("torchvision", None), __path__=[])
    sys.modules.setdefault("torchvision", stub)  # imported for data sets that are not used here
    from aimet_torch.quantization.affine import QuantizeDequantize
    from aimet_torch.quantsim import QuantizationSimModel
    from aimet_torch.seq_mse import apply_seq_mse

    batches = x.split(512)
    simulation = QuantizationSimModel(nn.Sequential(copy.deepcopy(module)), batches[0], default_param_bw=4)
    (layer,) = simulation.model
    layer.param_quantizers["weight"] = QuantizeDequantize((module.out_features, 1), 4, symmetric=False)
    apply_seq_mse(simulation, batches, num_candidates=20, forward_fn=lambda model, batch: model(batch))
    result: Tensor = layer.param_quantizers["weight"](layer.weight).detach()
    return result


def awq_llmcompressor(model: nn.Sequential, x: Tensor) -> nn.Sequential:
    from compressed_tensors.quantization import disable_quantization
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform import AWQModifier
    from llmcompressor.modifiers.transform.awq import AWQMapping
    from llmcompressor.pipelines.cache import IntermediatesCache

    weights = {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 64}
    rounding = QuantizationModifier(config_groups={"all": {"targets": ["Linear"], "weights": weights}})
    scaling = AWQModifier(mappings=[AWQMapping("re:^0$", ["re:^1$"])], duo_scaling=False, offload_device=None)
    twin = copy.deepcopy(model)
    rounding.initialize_quantization(twin)
    rounding.start_calibration(twin)
    twin.apply(disable_quantization)
    scaling._set_resolved_mappings(twin)
    scaling._setup_activation_cache_hooks()
    with torch.no_grad(), patch.object(IntermediatesCache, "pin_memory"):  # raises without an accelerator
        for batch in x.split(512):
            twin(batch)
        scaling._apply_smoothing(twin)
    return like(model, twin)


def smoothquant_llmcompressor(model: nn.Sequential, x: Tensor) -> nn.Sequential:
    from llmcompressor.modifiers.transform import SmoothQuantModifier

    scaling = SmoothQuantModifier(smoothing_strength=0.5, mappings=[[["re:^1$"], "re:^0$"]], scales_={})
    twin = copy.deepcopy(model)
    scaling.resolved_mappings_ = scaling._resolve_mappings(twin)
    scaling._setup_scale_hooks()
    with torch.no_grad():
        twin(x)
        scaling._apply_smoothing(twin)
    return like(model, twin)


def smoothquant_brevitas(model: nn.Sequential, x: Tensor) -> nn.Sequential:
    from brevitas.graph.equalize import activation_equalization_mode

    graph = torch.fx.symbolic_trace(copy.deepcopy(model))
    with torch.no_grad(), activation_equalization_mode(graph, 0.5, add_mul_node=False, layerwise=False):
        graph(x)
    return like(model, graph)


def equalize_brevitas(model: nn.Sequential, x: Tensor) -> nn.Sequential:
    from brevitas.graph.equalize import EqualizeGraph

    graph = torch.fx.symbolic_trace(copy.deepcopy(model))
    equalizer = EqualizeGraph(iterations=200, threshold=None, merge_bias=False)
    with torch.no_grad():
        return like(model, equalizer.apply(graph))


def like(model: nn.Sequential, scaled: nn.Module) -> nn.Sequential:
    """Return a copy of the model with the parameters of one that has more around them."""
    twin, found = copy.deepcopy(model), scaled.state_dict()
    twin.load_state_dict({name: found[name] for name in twin.state_dict()})
    return twin


@torch.no_grad()
def output_error(model: nn.Module, x: Tensor, found: nn.Module) -> float:
    return sum((found(part) - model(part)).square().sum().item() for part in x.split(4096))


@torch.no_grad()
def weights_output_error(model: nn.Module, x: Tensor, found: nn.Module) -> float:
    """Leave the bias out, which some methods correct as well."""
    return (x @ (found[0].weight - model[0].weight).T).square().sum().item()  # type: ignore[index,operator]


@torch.no_grad()
def weight_error(model: nn.Module, x: Tensor, found: nn.Module) -> float:
    return (found[0].weight - model[0].weight).abs().pow(0.7).sum().item()  # type: ignore[index,operator]


@dataclass(frozen=True)
class Row:
    """A method, by us and by a package.

    Args:
        rounding: the recipe that rounds.
        method: what our method adds to it.
        package: whose code `theirs` calls.
        theirs: the layers and what reaches them to what the package makes of them.
        cases: the layers.
        error: of the layers, what reaches them, what they became.
    """

    rounding: Mapping[str, Any]
    method: Mapping[str, Any]
    package: str
    theirs: Callable[[nn.Sequential, Tensor], nn.Module]
    cases: Callable[[], Cases] = linear_layers
    error: Callable[[nn.Module, Tensor, nn.Module], float] = weights_output_error


def weight_of(find: Callable[[Any, Tensor], Tensor]) -> Callable[[nn.Sequential, Tensor], nn.Module]:
    return lambda model, x: alone(find(model[0], x))


def transform(
    rounding: Mapping[str, Any],
    method: Mapping[str, Any] | str,
    package: str,
    theirs: Callable[[nn.Sequential, Tensor], nn.Sequential],
    cases: Callable[[], Cases],
) -> Row:
    def rounded(model: nn.Sequential, x: Tensor) -> nn.Module:
        return ours(theirs(model, x), x, rounding)

    return Row(rounding, {"transform": [method]}, package, rounded, cases, output_error)


ASYMMETRIC: dict[str, Any] = {**GROUPS, **UNSIGNED}
ROWS = {
    "gptq, a scale a channel": Row(
        {"weight": {**CHANNEL, **SIXTEEN}}, {"finetune": [{"name": "gptq", "act_order": False}]},
        "llmcompressor",
        weight_of(lambda m, x: gptq_llmcompressor(m, x, m.in_features)),
    ),
    "gptq, act_order, blocks of 64": Row(
        {"weight": {**GROUPS, **SIXTEEN}}, {"finetune": [{"name": "gptq"}]}, "llmcompressor",
        weight_of(lambda m, x: gptq_llmcompressor(m, x, 64)),
    ),
    "adaround, 500 steps": Row(
        {"weight": CHANNEL}, {"finetune": [{"name": "adaround"}]}, "brevitas",
        weight_of(lambda m, x: adaround_brevitas(m, x, 500)),
    ),
    "autoround, 200 steps": Row(
        {"weight": ASYMMETRIC}, {"finetune": [{"name": "autoround"}]}, "auto_round",
        weight_of(lambda m, x: autoround(m, x, 200)),
    ),
    "seqmse, asymmetric, 20 ranges": Row(
        {"weight": {**CHANNEL, **UNSIGNED}},
        {"finetune": [{"name": "seqmse", "steps": 20, "least": 0.05}]}, "aimet_torch",
        weight_of(seqmse_aimet),
    ),
    "bias_correction": Row(
        {"weight": CHANNEL}, {"finetune": [{"name": "bias_correction"}]}, "brevitas",
        bias_correction_brevitas, error=output_error,
    ),
    "hqq, 4 bits": Row(
        {"weight": ASYMMETRIC}, {"weight": {**ASYMMETRIC, "quantizer": "hqq"}}, "hqq",
        weight_of(lambda m, x: hqq_weight(m.weight.detach(), 4)), error=weight_error,
    ),
    "hqq, 3 bits": Row(
        {"weight": {**ASYMMETRIC, "num_bits": 3}},
        {"weight": {**ASYMMETRIC, "num_bits": 3, "quantizer": "hqq"}}, "hqq",
        weight_of(lambda m, x: hqq_weight(m.weight.detach(), 3)), error=weight_error,
    ),
    "awq": transform({"weight": {**GROUPS, **SIXTEEN}}, "awq", "llmcompressor", awq_llmcompressor, norms),
    "smoothquant, W8A8": transform(
        {"weight": {"num_bits": 8}, "activation": {"num_bits": 8}}, "smoothquant", "llmcompressor",
        smoothquant_llmcompressor, norms,
    ),
    "smoothquant, W8A8, maxima": transform(
        {"weight": {"num_bits": 8}, "activation": {"num_bits": 8}}, "smoothquant", "brevitas",
        smoothquant_brevitas, norms,
    ),
    "equalize, W8, one scale a tensor": transform(
        {"weight": {"num_bits": 8, "granularity": "layer"}}, {"name": "equalize", "objective": "ranges"},
        "brevitas", equalize_brevitas, inverted_residuals,
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="*", default=[""], help="words; rows whose name holds one of them")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for name, row in ROWS.items():
        if not any(word in name for word in args.rows):
            continue
        if importlib.util.find_spec(row.package) is None:
            print(f"{name}: {row.package} is not installed")
            continue
        for case, (model, x) in row.cases().items():
            torch.manual_seed(0)
            nearest = row.error(model, x, ours(model, x, row.rounding))
            start = time.process_time()
            own = row.error(model, x, ours(model, x, {**row.rounding, **row.method})) / nearest
            middle = time.process_time()
            other = row.error(model, x, row.theirs(model, x)) / nearest
            spent = f"{middle - start:5.1f} / {time.process_time() - middle:5.1f} CPU s"
            print(f"{name:32s} {case:40s} qpipe {own:.4f}  {row.package} {other:.4f}  {spent}", flush=True)


if __name__ == "__main__":
    main()
