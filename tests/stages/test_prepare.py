from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from qpipe_methods.granularity.subchannel import PerSubchannel
from torch import Tensor, nn
from torch.nn import functional as F

from qpipe import DataError, FinetuneStrategy, QpipeError, Recipe, RecipeError, Role, Task
from qpipe.nn import disabled, edge_quantizers, weight_quantizers
from qpipe.recipe import LayerRule, SlotEdit
from qpipe.stages.prepare import Preparation, place, prepare

MakeRecipe = Callable[..., Recipe]
Calibrate = Callable[..., None]


class BasicBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        result: Tensor = self.relu(y)
        return result


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.layer1 = nn.Sequential(BasicBlock(8), BasicBlock(8))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(self.pool(self.relu(self.bn1(self.conv1(x)))))
        result: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return result


class MBConv(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 2 * channels
        self.expand, self.bn0 = nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.depthwise, self.bn1 = nn.Conv2d(wide, wide, 3, groups=wide, bias=False), nn.BatchNorm2d(wide)
        self.project, self.bn2 = nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.bn0(self.expand(x)))
        y = F.hardtanh(self.bn1(self.depthwise(F.pad(y, (1, 1, 1, 1)))), 0.0, 6.0)
        return x + self.bn2(self.project(y))


class DictTuple(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(20, 8), nn.LSTM(8, 6, batch_first=True, bidirectional=True)
        self.mix, self.head = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, ids: Tensor, features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x, _ = self.lstm(self.embed(ids))
        y = x[:, -1] + self.mix(features)
        return self.head(y), {"features": y}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def names(preparation: Preparation) -> list[str]:
    return [edge.name for edge, _ in preparation.edges]


def quantized(
    model: nn.Module, batch: object, recipe: Recipe, calibrate_on: Calibrate, tolerance: float = 0.05
) -> Preparation:
    """Prepare and calibrate; see that the float function is kept and the quantized one is near."""
    args, kwargs = Task().inputs(batch)
    model.eval()
    with torch.no_grad():
        expected = Task().compared(model(*args, **kwargs))
        keys = list(model.state_dict())
        preparation = prepare(model, [batch], Task(), recipe)
        with disabled(model):
            floating = Task().compared(model(*args, **kwargs))
        calibrate_on(model, *args, **kwargs)
        result = Task().compared(model(*args, **kwargs))
    assert [key for key in model.state_dict() if "_quantizer" not in key] == keys
    torch.testing.assert_close(floating, expected, rtol=1e-4, atol=1e-5)
    assert 0 < (result - expected).norm() / expected.norm() < tolerance
    assert [edge.name for edge in edge_quantizers(model)] == names(preparation)
    return preparation


class TestPlacement:
    def test_of_a_residual_network_with_a_shared_relu(
        self, make_recipe: MakeRecipe, calibrate_on: Calibrate
    ) -> None:
        preparation = quantized(ResNet(), torch.randn(4, 3, 16, 16), make_recipe(), calibrate_on)
        assert [(edge.name, edge.owner, edge.op, edge.call) for edge, _ in preparation.edges] == [
            ("input", "", "input", 0),
            ("relu", "relu", "conv2d+batch_norm+relu", 0),
            ("layer1.0.relu", "layer1.0", "conv2d+batch_norm+relu", 0),
            ("layer1.0.bn2", "layer1.0.bn2", "conv2d+batch_norm", 0),
            ("layer1.0.relu:1", "layer1.0", "add+relu", 1),
            ("layer1.1.relu", "layer1.1", "conv2d+batch_norm+relu", 0),
            ("layer1.1.bn2", "layer1.1.bn2", "conv2d+batch_norm", 0),
            ("layer1.1.relu:1", "layer1.1", "add+relu", 1),
            ("avgpool", "avgpool", "adaptive_avg_pool2d", 0),
        ]
        assert preparation.edges[1][0].consumers == ("layer1.0.conv1", "layer1.0.add")  # through the max-pool
        assert [name for name, _, _ in preparation.weights] == [
            "conv1:weight",
            "layer1.0.conv1:weight",
            "layer1.0.conv2:weight",
            "layer1.1.conv1:weight",
            "layer1.1.conv2:weight",
            "fc:weight",
        ]
        assert not preparation.skipped

    def test_of_depthwise_blocks_with_relu6(self, make_recipe: MakeRecipe, calibrate_on: Calibrate) -> None:
        model = nn.Sequential(MBConv(4), MBConv(4), nn.Conv2d(4, 2, 1))
        preparation = quantized(model, torch.randn(4, 4, 8, 8), make_recipe(), calibrate_on)
        assert [(edge.name, edge.op) for edge, _ in preparation.edges] == [
            ("input", "input"),
            ("0.relu6", "conv2d+batch_norm+relu6"),
            ("0.clamp", "conv2d+batch_norm+clamp"),
            ("0.bn2", "conv2d+batch_norm"),
            ("0.add", "add"),
            ("1.relu6", "conv2d+batch_norm+relu6"),
            ("1.clamp", "conv2d+batch_norm+clamp"),
            ("1.bn2", "conv2d+batch_norm"),
            ("1.add", "add"),
        ]

    def test_of_inputs_alone(self, make_recipe: MakeRecipe, calibrate_on: Calibrate) -> None:
        preparation = quantized(ResNet(), torch.randn(4, 3, 16, 16), make_recipe("generic"), calibrate_on)
        assert names(preparation) == [
            "input",
            "relu",
            "layer1.0.relu",
            "layer1.0.relu:1",
            "layer1.1.relu",
            "avgpool",
        ]

    def test_of_dict_inputs_and_a_recurrent_layer(
        self, make_recipe: MakeRecipe, calibrate_on: Calibrate
    ) -> None:
        batch = {"ids": torch.randint(0, 20, (4, 5)), "features": torch.randn(4, 8)}
        preparation = quantized(DictTuple(), batch, make_recipe(), calibrate_on)
        assert names(preparation) == ["input.features", "embed", "lstm", "mix", "add"]
        assert len(preparation.weights) == 1 + 4 + 2

    def test_of_an_encoder_whose_fast_path_would_pass_by(
        self, make_recipe: MakeRecipe, calibrate_on: Calibrate
    ) -> None:
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu")
        model = nn.TransformerEncoder(layer, 1)
        preparation = quantized(model, torch.randn(2, 5, 16), make_recipe(), calibrate_on)
        assert names(preparation) == [
            "input",
            "layers.0.self_attn.linear",
            "layers.0.self_attn.scaled_dot_product_attention",
            "layers.0.self_attn.linear:1",
            "layers.0.add",
            "layers.0.norm1",
            "layers.0.linear1",
            "layers.0.gelu",
            "layers.0.linear2",
            "layers.0.add:1",
        ]
        assert [name for name, _, _ in preparation.weights] == [
            "layers.0.self_attn:in_proj_weight",
            "layers.0.self_attn.out_proj:weight",
            "layers.0.linear1:weight",
            "layers.0.linear2:weight",
        ]

    def test_weights_alone_keep_the_fast_path_off(
        self, make_recipe: MakeRecipe, calibrate_on: Calibrate
    ) -> None:
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        recipe = make_recipe(activation=None)
        preparation = quantized(nn.TransformerEncoder(layer, 1), torch.randn(2, 5, 16), recipe, calibrate_on)
        assert not preparation.edges
        assert len(preparation.weights) == 4

    def test_of_layers_of_a_plain_sequence(self, make_recipe: MakeRecipe, calibrate_on: Calibrate) -> None:
        relu = nn.ReLU()
        model = nn.Sequential(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu, nn.Linear(4, 2))
        preparation = quantized(model, torch.randn(64, 4), make_recipe(), calibrate_on)
        assert names(preparation) == ["input", "1", "1:1"]
        assert len(model) == 5
        assert isinstance(model[-1], nn.Linear)

    def test_of_dense_blocks_that_iterate_their_own_items(
        self, make_recipe: MakeRecipe, calibrate_on: Calibrate
    ) -> None:
        class Dense(nn.ModuleDict):
            def forward(self, x: Tensor) -> Tensor:
                features = [x]
                for _, layer in self.items():
                    features.append(layer(torch.cat(features, 1)))
                return torch.cat(features, 1).relu()

        dense = Dense({"a": nn.Linear(4, 4), "b": nn.Linear(8, 4)})
        model = nn.Sequential(dense, nn.Linear(12, 2))
        preparation = quantized(model, torch.randn(64, 4), make_recipe(), calibrate_on)
        assert names(preparation) == ["input", "0.cat", "0.a", "0.cat:1", "0.b", "0.cat:2", "0.relu"]

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_of_bert(self, make_recipe: MakeRecipe, calibrate_on: Calibrate, attention: str) -> None:
        from transformers import BertConfig, BertModel

        config = BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            attn_implementation=attention,
        )
        mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
        batch = {"input_ids": torch.randint(0, 50, (2, 5)), "attention_mask": mask}
        preparation = quantized(BertModel(config), batch, make_recipe(), calibrate_on, tolerance=0.2)
        layer = "encoder.layer.0."
        core = {"sdpa": ["scaled_dot_product_attention"], "eager": ["matmul", "softmax", "matmul:1"]}
        assert names(preparation) == [
            "embeddings.LayerNorm",
            *(f"{layer}attention.self.{name}" for name in ("query", "key", "value")),
            *(f"{layer}attention.self.{name}" for name in core[attention]),
            f"{layer}attention.output.dense",
            f"{layer}attention.output.add",
            f"{layer}attention.output.LayerNorm",
            f"{layer}intermediate.dense",
            f"{layer}intermediate.intermediate_act_fn",
            f"{layer}output.dense",
            f"{layer}output.add",
            f"{layer}output.LayerNorm",
            "pooler.dense",
        ]
        assert not preparation.skipped

    def test_of_llama_keeps_rotary_parts_float_and_weights_tied(
        self, make_recipe: MakeRecipe, calibrate_on: Calibrate
    ) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            tie_word_embeddings=True,
            use_cache=False,
        )
        model = LlamaForCausalLM(config)
        batch = {"input_ids": torch.randint(0, 50, (2, 5))}
        preparation = quantized(model, batch, make_recipe(), calibrate_on, tolerance=0.2)
        layer = "model.layers.0."
        assert names(preparation) == [
            "model.embed_tokens",
            f"{layer}input_layernorm",
            *(f"{layer}self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "add", "add:1")),
            f"{layer}self_attn.scaled_dot_product_attention",
            f"{layer}self_attn.o_proj",
            f"{layer}add",
            f"{layer}post_attention_layernorm",
            *(f"{layer}mlp.{name}" for name in ("gate_proj", "up_proj", "mul", "down_proj")),
            f"{layer}add:1",
            "model.norm",
        ]
        assert model.lm_head._parameters["weight"] is model.model.embed_tokens._parameters["weight"]
        assert model.lm_head.weight_quantizer is model.model.embed_tokens.weight_quantizer
        assert sum(name == "model.embed_tokens:weight" for name, _, _ in preparation.weights) == 1


class TestLayers:
    def test_a_rule_changes_what_it_matches(self, make_recipe: MakeRecipe) -> None:
        rules = (
            LayerRule(
                "layer1.*", {Role.WEIGHT: SlotEdit(spec={"num_bits": 4}), Role.ACTIVATION: SlotEdit(off=True)}
            ),
        )
        preparation = place(ResNet(), [torch.randn(2, 3, 16, 16)], Task(), make_recipe(layers=rules))
        assert names(preparation) == ["input", "relu", "avgpool"]
        bits = {name: slot.spec.num_bits for name, _, slot in preparation.weights}
        assert bits["conv1:weight"] == 8
        assert bits["layer1.0.conv1:weight"] == 4
        assert preparation.skipped["layer1.0.bn2"] == "the recipe leaves it in floating point"

    def test_a_pattern_that_matches_nothing_is_refused_with_what_is_close(
        self, make_recipe: MakeRecipe
    ) -> None:
        rules = (LayerRule("layer1.0.convl", {Role.WEIGHT: SlotEdit(off=True)}),)
        with pytest.raises(RecipeError, match=r"'layer1\.0\.convl' matches no weight .*layer1\.0\.conv1"):
            place(ResNet(), [torch.randn(2, 3, 16, 16)], Task(), make_recipe(layers=rules))

    def test_a_group_that_does_not_divide_is_refused_with_the_layer(self, make_recipe: MakeRecipe) -> None:
        recipe = make_recipe()
        recipe = replace(recipe, weight=replace(recipe.weight, granularity=PerSubchannel(group_size=5)))
        with pytest.raises(RecipeError, match="0"):
            place(nn.Sequential(nn.Linear(12, 3)), [torch.randn(2, 12)], Task(), recipe)


class TestRefuses:
    def test_an_empty_calibration_set(self, make_recipe: MakeRecipe) -> None:
        with pytest.raises(DataError, match="empty"):
            prepare(ResNet(), [], Task(), make_recipe())

    def test_weights_that_are_not_finite(self, make_recipe: MakeRecipe) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        nn.init.constant_(model[1].weight, float("nan"))
        with pytest.raises(DataError, match="'1:weight' holds NaN"):
            prepare(model, [torch.randn(2, 4)], Task(), make_recipe())

    def test_a_model_that_is_another_in_training(self, make_recipe: MakeRecipe) -> None:
        class Fickle(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                y = x + self.linear(x)
                return (y if not self.training else y + x).relu() + x

        class Fit(FinetuneStrategy):
            name = "fit"

            def fit(self, *_: object) -> None:
                raise NotImplementedError

        batch = torch.randn(2, 4)
        prepare(Fickle(), [batch], Task(), make_recipe())
        with pytest.raises(QpipeError, match="'add' 2 times in evaluation and 3 times in training"):
            prepare(Fickle(), [batch], Task(), make_recipe(finetune=(Fit(),)))


class TestSkipped:
    def test_names_weights_that_no_code_serves(self, make_recipe: MakeRecipe) -> None:
        class Odd(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale = nn.Parameter(torch.randn(3, 4))
                self.unused = nn.Linear(4, 4)
                self.bilinear = nn.Bilinear(4, 4, 4)
                self.derived = nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                y = self.bilinear(x * self.scale, x)
                return F.linear(y, self.derived.weight * 2)

        preparation = prepare(Odd(), [torch.randn(3, 4)], Task(), make_recipe())
        assert not preparation.weights
        assert set(preparation.skipped) == {
            "scale",
            "unused:weight",
            "bilinear:weight",
            "derived:weight",
        }

    def test_planning_changes_nothing(self, make_recipe: MakeRecipe) -> None:
        model = ResNet()
        recipe = make_recipe()
        planned = place(model, [torch.randn(2, 3, 16, 16)], Task(), recipe)
        assert not weight_quantizers(model)
        assert type(model) is ResNet
        assert prepare(model, [torch.randn(2, 3, 16, 16)], Task(), recipe) == planned
