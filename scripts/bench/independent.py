"""Layer errors of our methods beside those of other packages' code for the same methods, on the same layers.

    pip install llmcompressor==0.14.0.1 auto-round==0.16.1 hqq==0.2.8.post1 brevitas==0.13.4   # or some
    python scripts/bench/independent.py

The linear layers of one block of MiniLM, their inputs on 64 sentences in floating point; the same weights
and inputs for both. Figures are the squared error of a layer's outputs over that of our rounding to nearest;
for HQQ the sum of the weights' errors to the power 0.7, which is what it lowers. One thread.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from decoder import peer_hqq
from torch import Tensor, nn

CHANNEL = {"num_bits": 4}
GROUPS = {"num_bits": 4, "granularity": {"name": "subchannel", "group_size": 64}}
UNSIGNED = {"symmetric": False, "signed": False, "restricted": False}


def layers(block: int) -> dict[str, tuple[nn.Linear, Tensor]]:
    """Return the linear layers of a block of MiniLM without biases, and what reaches them [N, K]."""
    from qpipe_zoo.data.sentences import Sentences
    from qpipe_zoo.model.minilm import minilm

    from qpipe import Task, calibration_batches

    model, data, seen = minilm(), Sentences(num_calibration=64), {}
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and f"layer.{block}." in n}
    for name, module in found.items():
        module.register_forward_pre_hook(lambda _, args, n=name: seen.setdefault(n, []).append(args[0]))
    with torch.no_grad():
        for args, kwargs in map(Task().inputs, calibration_batches(data, 64)):
            model(*args, **kwargs)
    return {n: (bare(m), torch.cat([x.flatten(0, -2) for x in seen[n]])) for n, m in found.items()}


def bare(module: nn.Linear) -> nn.Linear:
    twin = nn.Linear(module.in_features, module.out_features, bias=False)
    twin.weight.data.copy_(module.weight.data)
    return twin


def ours(module: nn.Linear, x: Tensor, weight: Mapping[str, Any], finetune: list[Any]) -> Tensor:
    """Return the weight a recipe gives the layer."""
    from qpipe import quantize

    choices: dict[str, Any] = {"activation": None, "transform": [], "evaluator": [], "target": "generic"}
    finetune = [{**strategy, "num_samples": len(x)} for strategy in finetune]
    model = quantize(
        nn.Sequential(module),
        [*x.split(512)],
        weight=weight,
        finetune=finetune,
        num_samples=len(x),
        **choices,
    )[0]
    result: Tensor = model[0].weight.detach()
    return result


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

    twin: Any = bare(module)
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


def output_error(module: nn.Linear, x: Tensor, found: Tensor) -> float:
    return (x @ (found - module.weight.detach()).T).square().sum().item()


def weight_error(module: nn.Linear, x: Tensor, found: Tensor) -> float:
    return (found - module.weight.detach()).abs().pow(0.7).sum().item()


Theirs = Callable[[nn.Linear, Tensor], Tensor]
SIXTEEN = {"restricted": False}  # levels: 4-bit symmetric codes of llm-compressor begin at -8
ASYMMETRIC: dict[str, Any] = {**GROUPS, **UNSIGNED}
HQQ: dict[str, Any] = {**ASYMMETRIC, "quantizer": "hqq"}
ROWS: dict[str, tuple[Mapping[str, Any], list[Any], str, Theirs]] = {
    "gptq, a scale a channel": (
        {**CHANNEL, **SIXTEEN},
        [{"name": "gptq", "act_order": False}],
        "llmcompressor",
        lambda m, x: gptq_llmcompressor(m, x, m.in_features),
    ),
    "gptq, act_order, blocks of 64": (
        {**GROUPS, **SIXTEEN},
        [{"name": "gptq"}],
        "llmcompressor",
        lambda m, x: gptq_llmcompressor(m, x, 64),
    ),
    "adaround, 500 steps": (
        CHANNEL,
        [{"name": "adaround"}],
        "brevitas",
        lambda m, x: adaround_brevitas(m, x, 500),
    ),
    "autoround, 200 steps": (
        ASYMMETRIC,
        [{"name": "autoround"}],
        "auto_round",
        lambda m, x: autoround(m, x, 200),
    ),
    "hqq, 4 bits": (HQQ, [], "hqq", lambda m, x: peer_hqq(m.weight.detach(), 4, False)),
    "hqq, 3 bits": ({**HQQ, "num_bits": 3}, [], "hqq", lambda m, x: peer_hqq(m.weight.detach(), 3, False)),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="*", default=[""])
    parser.add_argument("--block", type=int, default=3)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    found = layers(args.block)
    for row, (weight, finetune, package, theirs) in ROWS.items():
        error = weight_error if package == "hqq" else output_error
        if not any(word in row for word in args.rows):
            continue
        if importlib.util.find_spec(package) is None:
            print(f"{row}: {package} is not installed")
            continue
        for name, (module, x) in found.items():
            torch.manual_seed(0)
            nearest = error(module, x, ours(module, x, {**weight, "quantizer": "uniform"}, []))
            start = time.process_time()
            own = error(module, x, ours(module, x, weight, finetune)) / nearest
            middle = time.process_time()
            other = error(module, x, theirs(module, x)) / nearest
            spent = f"{middle - start:5.1f} / {time.process_time() - middle:5.1f} CPU s"
            print(f"{row:32s} {name:40s} qpipe {own:.4f}  {package} {other:.4f}  {spent}", flush=True)


if __name__ == "__main__":
    main()
