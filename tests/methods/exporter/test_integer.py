from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from qpipe_methods.exporter.integer import IntegerExporter
from qpipe_methods.granularity.layer import PerLayer
from qpipe_methods.granularity.subchannel import PerSubchannel
from qpipe_methods.integer.dyadic import dyadic, rescale, shared_dyadic, shift_right
from qpipe_methods.integer.interpreter import IntegerModule
from qpipe_methods.transform.fold_bn import FoldBatchNorm
from qpipe_zoo.model.resnet_digits import resnet_digits
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qpipe import Artifact, DataError, ExportContext, Recipe, RecipeError, Task
from qpipe.choices import build_recipe, library_config
from qpipe.nn import edge_quantizers, weight_quantizers
from qpipe.registry import PluginRegistry

MakeContext = Callable[..., ExportContext]
Exported = tuple[IntegerModule, Artifact, Path]


def test_a_factor_is_jacobs_fixed_point_number() -> None:
    b, c = dyadic(torch.tensor(0.0123, dtype=torch.float64))
    assert (int(b), int(c)) == (1690499128, 31 + 6)  # METHODS D: M0 = 0.7872 in Q31, n = 6
    assert int(b) / 2**31 == pytest.approx(0.7872, abs=5e-5)
    assert abs(int(b) / 2 ** int(c) / 0.0123 - 1) == pytest.approx(1.7e-10, rel=0.05)


@pytest.mark.parametrize(
    ("factor", "b", "c"), [(1.0, 2**30, 30), (0.5, 2**30, 31), (1 - 2**-40, 2**30, 30), (6.0, 3 * 2**29, 28)]
)
def test_a_mantissa_rounded_up_to_one_stays_31_bits(factor: float, b: int, c: int) -> None:
    assert [int(x) for x in dyadic(torch.tensor(factor, dtype=torch.float64))] == [b, c]


def test_a_factor_too_small_for_the_shift_keeps_fewer_bits() -> None:
    b, c = dyadic(torch.tensor([2.0**-50 * 1.5, 2.0**-70], dtype=torch.float64))
    assert b.tolist() == [3 * 2**11, 0]
    assert c.tolist() == [62, 62]


def test_rescaling_rounds_like_exact_fractions() -> None:
    draw = random.Random(0)
    sums = [draw.randint(-(2**31), 2**31 - 1) for _ in range(400)]
    factors = torch.tensor([2 ** draw.uniform(-31, 0) for _ in sums], dtype=torch.float64)
    b, c = dyadic(factors)
    exact = [round(Fraction(a * int(m), 2 ** int(n))) for a, m, n in zip(sums, b, c, strict=True)]
    assert rescale(torch.tensor(sums, dtype=torch.int32), b, c).tolist() == exact


def test_ties_go_to_even() -> None:
    assert shift_right(torch.tensor([-6, -2, 2, 6, 10]), 2).tolist() == [-2, 0, 0, 2, 2]


def test_summands_share_one_shift() -> None:
    factors = torch.tensor([0.8, 0.03], dtype=torch.float64)
    b, c = shared_dyadic(factors, 21)
    assert 2**20 <= int(b[0]) < 2**21
    assert (b.double() / 2**c - factors).abs().max() < 2.0 ** -(c + 0.9)


class Residual(nn.Module):
    """Border, strides, depthwise, ReLU6, a residual sum, both poolings, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))
        self.stem = nn.Conv2d(3, 8, 3, 2)
        self.expand = nn.Conv2d(8, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.project = nn.Conv2d(16, 8, 1)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(8, 16)
        self.fc2 = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(self.pad(x)))
        y = nn.functional.relu6(self.depthwise(nn.functional.relu6(self.expand(x), inplace=True)))
        x = self.pool(torch.relu(x + self.project(y))).mean((2, 3))
        logits: Tensor = self.fc2(torch.relu(self.fc1(x)))
        return logits


class Joined(nn.Module):
    """A keyword, a clip, concatenation of other scales, windows with a border, a sum that is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(2, 4, 3, padding="same", bias=False)
        self.right = nn.Conv2d(2, 4, 1)
        self.average = nn.AvgPool2d(3, 2, 1)
        self.blocks = nn.AdaptiveAvgPool2d(2)
        self.skip = nn.Linear(32, 6)
        self.head = nn.Linear(32, 6)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.cat([self.left(image), self.right(image).clamp(-0.5, 0.5)], 1)
        x = self.blocks(self.average(x)).permute(0, 2, 3, 1).contiguous().view(image.shape[0], -1)
        summed: Tensor = self.head(x) + self.skip(x)
        return summed


def residual() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    return Residual(), [torch.randn(16, 3, 16, 16), torch.randn(7, 3, 16, 16)]


def joined() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    return Joined(), [{"image": torch.randn(12, 2, 15, 15)}]


def digits() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = resnet_digits()
    batches = [torch.rand(16, 1, 8, 8)]
    recipe = build_recipe(library_config({}, exporting=False), PluginRegistry.load_installed())
    FoldBatchNorm().apply(model, batches, Task(), recipe)
    return model, batches


def export(context: ExportContext) -> tuple[IntegerModule, Artifact]:
    artifact = IntegerExporter().export(context)
    assert isinstance(artifact.module, IntegerModule)
    return artifact.module, artifact


_EXPORTED: list[Exported] = []


@pytest.fixture
def exported(make_context: MakeContext, tmp_path: Path) -> Exported:
    """Export the residual network once for all tests that only read it."""
    if not _EXPORTED:
        module, artifact = export(make_context(*residual()))
        _EXPORTED.append((module, artifact, tmp_path / artifact.path))
    return _EXPORTED[0]


@pytest.mark.parametrize("network", [residual, joined, digits])
@pytest.mark.parametrize("granularity", ["channel", "layer"])
def test_every_edge_is_within_one_step_given_the_same_codes(
    network: Callable[[], Any],
    granularity: str,
    make_context: MakeContext,
    make_recipe: Callable[..., Recipe],
) -> None:
    recipe = make_recipe()
    assert recipe.weight is not None
    if granularity == "layer":
        spec = replace(recipe.weight.spec, symmetric=False, restricted=False)
        recipe = replace(recipe, weight=replace(recipe.weight, granularity=PerLayer(), spec=spec))
    context = make_context(*network(), recipe)
    _, artifact = export(context)
    assert artifact.proof["edges"] == len(edge_quantizers(context.simulation))
    assert artifact.proof["largest_edge_difference_steps"] <= 1
    assert artifact.proof["equal_codes_percent"] > 99.9
    assert artifact.proof["sqnr_db"] > 35


def test_the_network_is_what_was_expected(exported: Exported) -> None:
    _, artifact, _ = exported
    expected = {"convolution": 4, "linear": 2, "add": 1, "max_pool": 1, "pad": 1, "sum": 1}
    assert artifact.proof["steps"] == expected


def test_powers_of_two_leave_no_difference_at_all(make_context: MakeContext) -> None:
    context = make_context(*residual())
    for quantizer in [
        *edge_quantizers(context.simulation),
        *(w.fake_quant for w in weight_quantizers(context.simulation)),
    ]:
        quantizer.scale = 2.0 ** torch.round(torch.log2(quantizer.scale))
    for module in context.simulation.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            module.bias.data.zero_()  # a bias is rounded to s_x s_w, which the simulation does not do
    module, artifact = export(context)
    assert artifact.proof["equal_codes_percent"] == 100
    with torch.no_grad():
        assert torch.equal(module(context.batches[1]), context.simulation(context.batches[1]))  # type: ignore[index]


def test_a_convolution_is_the_sum_of_the_papers_equation(make_context: MakeContext) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    context = make_context(model, [torch.randn(2, 3, 5, 5)])
    module, _ = export(context)
    values = module.values(context.batches[0])  # type: ignore[index]
    first = module.program.steps[0]
    assert first.codes is not None
    x = nn.functional.pad(values["input"] - module.program.input.zero_point, (1, 1, 1, 1)).tolist()
    tensors = {role: module.program.tensors[key].tolist() for role, key in first.tensors.items()}
    for n, k, i, j in [(0, 0, 0, 0), (1, 3, 2, 4), (0, 2, 4, 1)]:
        window = [(c, u, v) for c in range(3) for u in range(3) for v in range(3)]
        total = sum(tensors["weight"][k][c][u][v] * x[n][c][i + u][j + v] for c, u, v in window)
        factor = Fraction(tensors["multiplier"][k][0][0], 2 ** tensors["shift"][k][0][0])
        code = round((total + tensors["bias"][k]) * factor) + first.codes.zero_point  # Jacob et al., eq. 4
        assert values[first.output][n, k, i, j] == min(max(code, first.codes.low), first.codes.high)


def test_int64_sums_give_the_same_codes(exported: Exported) -> None:
    module, loud = exported[0], 100 * residual()[1][0]
    assert torch.equal(module(loud), IntegerModule(module.program, torch.int64)(loud))


def test_a_sum_that_may_leave_int32_is_refused(make_context: MakeContext) -> None:
    model = nn.Sequential(nn.Linear(70_000, 2, bias=False), nn.ReLU(), nn.Linear(2, 2))
    nn.init.ones_(model[0].weight)  # 70,000 x 127 x 255 > 2^31
    context = make_context(model, [torch.rand(2, 70_000)])
    with pytest.raises(RecipeError, match=r"may reach 2\.27e\+09 and int32 holds 2147483647"):
        export(context)


def test_a_dead_channel_keeps_its_bias(make_context: MakeContext) -> None:
    model, batches = residual()
    assert isinstance(model, Residual)
    with torch.no_grad():
        model.project.weight[2] = 0
        model.project.bias[2] = 3.0  # type: ignore[index]
        model.depthwise.weight[0] = 1e-20
    _, artifact = export(make_context(model, batches))
    assert artifact.proof["largest_edge_difference_steps"] <= 1


def test_the_file_holds_integers_and_the_units_of_the_output(
    exported: Exported,
) -> None:
    module, _, path = exported
    with safe_open(path, framework="pt") as file:
        dtypes = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert {name for name, dtype in dtypes.items() if dtype.is_floating_point} == {"linear_1.unit"}
    assert {dtype for name, dtype in dtypes.items() if name.endswith(".weight")} == {torch.int8}
    loaded = IntegerExporter.load(path)
    assert loaded is not None
    assert torch.equal(loaded(torch.ones(1, 3, 16, 16)), module(torch.ones(1, 3, 16, 16)))


def content(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()["qpipe.integer"]), tensors


def rewritten(path: Path, change: Callable[[dict[str, Any]], None], to: Path) -> Path:
    about, tensors = content(path)
    change(about)
    save_file(tensors, to, metadata={"qpipe.integer": json.dumps(about)})
    return to


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda about: about["steps"][2].update(inputs=["elsewhere"]),
            "reads 'elsewhere', which nothing makes",
        ),
        (lambda about: about["steps"][2].update(op="system"), "operation 'system', unknown"),
        (lambda about: about["steps"][2].update(command="rm"), "broken program"),
        (lambda about: about.update(version=2), "version 2, this qpipe reads 1"),
        (lambda about: about.update(output="nothing"), "nothing makes the output"),
        (lambda about: about.update(keyword=["x"]), r"the keyword is \['x'\]"),
        (lambda about: about["input"].update(scale=0), "codes of scale 0"),
        (lambda about: about["input"].update(zero_point=None), "codes from 0 to 255 around None"),
        (lambda about: about["steps"][2]["codes"].update(low=300), "codes from 300 to 255"),
        (lambda about: about["steps"][2].update(args=[1]), "no operation with arguments by name"),
        (lambda about: about["steps"][2].update(op=["add"]), "no operation with arguments by name"),
    ],
)
def test_an_edited_program_is_refused(
    change: Callable[[dict[str, Any]], None],
    message: str,
    exported: Exported,
    tmp_path: Path,
) -> None:
    with pytest.raises(DataError, match=message):
        IntegerExporter.load(rewritten(exported[2], change, tmp_path / "edited.safetensors"))


def test_a_program_that_nests_or_shifts_without_end_is_refused(exported: Exported, tmp_path: Path) -> None:
    about, tensors = content(exported[2])
    path = tmp_path / "edited.safetensors"
    save_file(tensors, path, metadata={"qpipe.integer": "[" * 9999})
    with pytest.raises(DataError, match="recursion"):
        IntegerExporter.load(path)
    shifts = {name: x + 63 for name, x in tensors.items() if name.endswith(".shift")}
    save_file(tensors | shifts, path, metadata={"qpipe.integer": json.dumps(about)})
    with pytest.raises(DataError, match="shifts by more than 62 bits"):
        IntegerExporter.load(path)


def test_a_call_without_the_input_is_refused(exported: Exported) -> None:
    with pytest.raises(DataError, match="takes 'its input', which this call lacks"):
        exported[0](image=torch.ones(1, 3, 16, 16))


def test_a_truncated_file_and_another_shape_are_refused(exported: Exported, tmp_path: Path) -> None:
    module, _, whole = exported
    with pytest.raises(DataError, match=r"shape \[1, 4, 16, 16\] does not pass"):
        module(torch.ones(1, 4, 16, 16))
    path = tmp_path / "short.safetensors"
    path.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(DataError, match="cannot be read"):
        IntegerExporter.load(path)


def test_a_network_without_an_integer_form_is_refused(make_context: MakeContext) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.SiLU(), nn.Conv2d(2, 2, 3))
    with pytest.raises(RecipeError, match="'silu' has no integer form here; leave out exporter integer"):
        export(make_context(model, [torch.randn(2, 1, 8, 8)]))


@pytest.mark.parametrize(
    ("role", "changes", "reason"),
    [
        ("activation", {"dynamic": True}, "dynamic=true"),
        ("weight", {"num_bits": 12}, "weight.num_bits=12"),
    ],
)
def test_what_cannot_be_expressed_is_said_in_a_sentence(
    role: str, changes: dict[str, Any], reason: str, make_recipe: Callable[..., Recipe]
) -> None:
    recipe = make_recipe()
    slot = getattr(recipe, role)
    changed = replace(slot, spec=replace(slot.spec, **changes))
    assert IntegerExporter().reason_not(recipe) is None
    assert reason in str(IntegerExporter().reason_not(replace(recipe, **{role: changed})))


def test_weights_alone_and_several_scales_a_channel_cannot_be_expressed(
    make_recipe: Callable[..., Recipe],
) -> None:
    recipe = make_recipe()
    assert recipe.weight is not None
    assert "leave neither of them null" in str(IntegerExporter().reason_not(replace(recipe, activation=None)))
    fine = replace(recipe.weight, granularity=PerSubchannel(group_size=64))
    assert "more scales" in str(IntegerExporter().reason_not(replace(recipe, weight=fine)))
