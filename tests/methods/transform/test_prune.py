from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer
from qpipe_methods.pruning import largest_of_each, largest_share
from qpipe_methods.quadratic import input_products
from qpipe_methods.transform.prune import Prune, compensated, input_norms, removal_loss
from qpipe_zoo.task.classification import Classification
from torch import Tensor, nn

from qpipe import DataError, RecipeError, Task
from qpipe.nn import weight_quantizers
from qpipe.pipeline import quantize


class Squares(Task):
    """Half the squared error, summed: its gradient by hand is (y - t) xᵀ."""

    def loss(self, output: Tensor, batch: list[Tensor]) -> Tensor:
        return 0.5 * (output - batch[1]).square().sum()


def linear(weight: list[list[float]]) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight), bias=False)
    layer.weight.data = torch.tensor(weight)
    return layer


def pruned(model: nn.Module, batches: list[Any], **arguments: object) -> Tensor:
    Prune(**arguments).apply(model, batches, Squares(), None)  # type: ignore[arg-type]
    return next(model.parameters()).detach()


BATCHES = [
    (torch.tensor([[1.0, 2.0, -1.0]]), torch.tensor([[0.0, 1.0]])),
    (torch.tensor([[3.0, 0.5, 2.0]]), torch.tensor([[2.0, -1.0]])),
]
WEIGHT = torch.tensor([[0.5, -1.0, 2.0], [0.25, 1.5, -0.75]])


def by_hand() -> list[Tensor]:
    return [(x @ WEIGHT.T - t).T @ x for x, t in BATCHES]


@pytest.mark.parametrize(
    ("saliency", "score"),
    [
        ("snip", lambda g: (sum(g) * WEIGHT).abs()),
        ("taylor", lambda g: sum((each * WEIGHT) ** 2 for each in g)),
    ],
)
def test_saliency_is_that_of_the_gradient_by_hand(
    saliency: str, score: Callable[[list[Tensor]], Tensor]
) -> None:
    model = nn.Sequential(linear(WEIGHT.tolist()))
    (found,) = Prune(saliency).scores(model, {"0": model[0]}, BATCHES, Squares())  # type: ignore[arg-type]
    assert torch.allclose(found, score(by_hand()))


@pytest.mark.parametrize(("saliency", "score"), [("snip", 0.09), ("taylor", 0.0081)])
def test_a_weight_that_the_loss_wants_larger_matters_too(saliency: Any, score: float) -> None:  # noqa: ANN401
    """At w = 0.1, x = 1, t = 1 the gradient is -0.9, and g w is negative."""
    model, batch = linear([[0.1]]), (torch.ones(1, 1), torch.ones(1, 1))
    (found,) = Prune(saliency).scores(model, {"": model}, [batch], Squares())
    assert found.item() == pytest.approx(score)


def test_gradients_that_cancel_matter_to_taylor_but_not_to_snip() -> None:
    """At w = 0.1 the gradients by x = ±1 and t = 0.1 ± 1 are ∓1·±1: their sum is 0, their squares add."""
    x = torch.tensor([[1.0, 1.0]])
    batches = [(x, torch.tensor([[1.2]])), (x, torch.tensor([[-0.8]]))]
    scores = {
        kind: Prune(kind).scores(m := linear([[0.1, 0.1]]), {"": m}, batches, Squares())[0]  # type: ignore[arg-type]
        for kind in ("snip", "taylor")
    }
    assert scores["snip"].abs().max() < 1e-6
    assert scores["taylor"].flatten().tolist() == pytest.approx([0.02, 0.02])


def test_wanda_weighs_by_the_norm_of_the_input_within_each_row() -> None:
    """Inputs of norm √10, √4.25 and √5 leave 1.0 √4.25 and 0.75 √5 the least, not the smallest weights."""
    model = linear([[0.8, -1.0, 2.0], [0.7, 1.5, -0.75]])
    weight = pruned(model, BATCHES, saliency="wanda", sparsity=1 / 3)
    assert torch.equal(weight, torch.tensor([[0.8, 0.0, 2.0], [0.7, 1.5, 0.0]]))


def test_removing_a_weight_costs_what_refitting_the_rest_leaves() -> None:
    """OBS: for each single weight of 4 rows, a least-squares refit of the others finds the same loss."""
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(50, 5, generator=generator, dtype=torch.float64)
        @ torch.randn(5, 5, generator=generator).double()
    )
    layer = nn.Linear(5, 4, bias=False).double()
    wanted = x @ layer.weight.detach().T
    found = removal_loss(layer, input_products(layer, x))
    for i in range(5):
        others = [j for j in range(5) if j != i]
        refit = torch.linalg.lstsq(x[:, others], wanted).solution
        loss = 0.5 * (x[:, others] @ refit - wanted).square().sum(0)
        assert torch.allclose(found[:, i], loss)


def test_two_inputs_by_hand() -> None:
    """H = [[2, 1], [1, 3]]: w1 = 1 costs 1² · 5 / (2 · 3) and moves w2 by 1/3; w2 = 1 costs 5 / 4."""
    layer, hessian = linear([[1.0, 1.0]]), torch.tensor([[[2.0, 1.0], [1.0, 3.0]]])
    assert removal_loss(layer, hessian).tolist() == [pytest.approx([5 / 6, 5 / 4])]
    kept = compensated(layer.weight.detach(), torch.tensor([[0.0, 1.0]]), hessian)
    assert kept.tolist() == [[0.0, pytest.approx(4 / 3)]]


@pytest.mark.parametrize(
    "arguments", [{"sparsity": 0.5}, {"n": 2, "m": 4}, {"sparsity": 0.25, "scope": "row"}]
)
def test_what_obs_keeps_is_the_least_squares_fit(arguments: dict[str, Any]) -> None:
    """Each row of a grouped convolution, by torch.linalg.lstsq on unfolded inputs."""
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(8, 6, 3, groups=2, padding=1, bias=False)
    x = torch.randn(4, 8, 6, 6, generator=generator)
    dense = conv.weight.detach().clone()
    Prune("obs", damping=1e-9, **arguments).apply(nn.Sequential(conv), [x], Task(), None)  # type: ignore[arg-type]
    assert (conv.weight == 0).float().mean() == pytest.approx(arguments.get("sparsity", 0.5), abs=0.02)
    for o in range(6):
        columns = nn.functional.unfold(x[:, o // 3 * 4 : o // 3 * 4 + 4], 3, padding=1).mT.reshape(-1, 36)
        row, kept = conv.weight[o].detach().flatten(), conv.weight[o].flatten() != 0
        fit = torch.linalg.lstsq(columns[:, kept].double(), (columns @ dense[o].flatten()).double())
        assert torch.allclose(row[kept].double(), fit.solution, atol=1e-4)


def test_obs_errs_less_than_wanda_and_magnitude() -> None:
    """On correlated inputs, half the weights of a layer, by the squared error of its output."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 16, generator=generator) @ torch.randn(16, 16, generator=generator)
    start = torch.randn(8, 16, generator=generator)
    errors = [
        (x @ (pruned(linear(start.tolist()), [(x, x)], saliency=s) - start).T).square().mean().item()
        for s in ("obs", "wanda", "magnitude")
    ]
    assert errors[0] < 0.8 * min(errors[1:])


def test_a_layer_that_is_not_called_is_pruned_by_magnitude() -> None:
    model = nn.ModuleList([linear([[3.0, 1.0]])])
    model.forward = lambda x: x  # type: ignore[method-assign]
    assert pruned(model, [(torch.ones(1, 2), torch.ones(1))], saliency="obs").tolist() == [[3.0, 0.0]]


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolutions_norm_is_that_of_the_channel_it_reads(groups: int) -> None:
    conv = nn.Conv2d(4, 6, 3, groups=groups)
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    (norm,) = input_norms(conv, [conv], [x], Task())
    for o in range(6):
        first = o // (6 // groups) * (4 // groups)
        for i in range(4 // groups):
            wanted = x[:, first + i].norm()
            assert norm.expand_as(conv.weight)[o, i].allclose(wanted)


def test_scopes_take_the_share_among_rows_layers_or_the_model() -> None:
    scores = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, 6.0], [7.0, 8.0]])]
    wanted = {
        "row": [[[0, 1], [0, 1]], [[0, 1], [0, 1]]],
        "layer": [[[0, 0], [1, 1]], [[0, 0], [1, 1]]],
        "model": [[[0, 0], [0, 0]], [[1, 1], [1, 1]]],
    }
    for scope, masks in wanted.items():
        assert [m.tolist() for m in Prune(scope=scope).masks(scores)] == masks  # type: ignore[arg-type]
    assert [Prune(s).scope for s in ("magnitude", "snip", "taylor", "wanda", "obs")] == [
        *("layer", "model", "model", "row", "layer")
    ]  # type: ignore[arg-type]


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9])
def test_the_smallest_share_goes(sparsity: float) -> None:
    weight = torch.randn(200, generator=torch.Generator().manual_seed(0))
    mask = largest_share(weight.abs(), 1 - sparsity).bool()
    assert (~mask).sum() == round(sparsity * 200)
    if sparsity:
        assert weight[~mask].abs().max() <= weight[mask].abs().min()


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 3, 3)])
def test_every_group_of_inputs_keeps_exactly_n(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    mask = largest_of_each(weight.abs(), 2, 4)
    flat = weight.abs().transpose(0, 1).reshape(8, -1).T
    kept = mask.transpose(0, 1).reshape(8, -1).T
    for row, chosen in zip(flat, kept, strict=True):
        for i in (0, 4):
            best = sorted(range(i, i + 4), key=lambda j: -float(row[j]))[:2]
            assert [j for j in range(i, i + 4) if chosen[j]] == sorted(best)


def test_the_mask_survives_training_and_quantization() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    data = [(torch.randn(16, 8), torch.arange(16) % 3) for _ in range(4)]
    words = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    tuned, _ = quantize(
        model,
        data,
        task=Classification(),
        trainer=Trainer(accelerator="cpu", max_epochs=2, enable_model_summary=False, **words),
        transform=[{"name": "prune", "n": 2, "m": 4}],
        finetune=["lsq"],
        evaluator=[],
        weight={"num_bits": 4},
    )
    first = weight_quantizers(tuned)[0]
    before = largest_of_each(model[0].weight.abs(), 2, 4).bool()
    assert not torch.equal(first.blocks_input()[before], model[0].weight[before])
    assert first.blocks_input()[~before].count_nonzero() == 0
    assert first.fake_quant.codes(first.blocks_input())[~before].count_nonzero() == 0


@pytest.mark.parametrize(
    "arguments", [{"sparsity": 1.5}, {"n": 4, "m": 4}, {"n": 2, "scope": "row"}, {"damping": 0.0}]
)
def test_meaningless_budgets_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"transform\.prune"):
        Prune(**arguments)


@pytest.mark.parametrize("arguments", [{"saliency": "luck"}, {"scope": "channel"}])
def test_unknown_words_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not"):
        Prune(**arguments)


def test_gradients_need_a_loss_and_finite_data() -> None:
    with pytest.raises(RecipeError, match="needs a loss"):
        Prune("snip").apply(linear([[1.0, 2.0]]), [], Task(), None)  # type: ignore[arg-type]
    bad = [(torch.tensor([[float("nan"), 1.0]]), torch.zeros(1, 1))]
    with pytest.raises(DataError, match="not finite"):
        Prune("taylor").apply(linear([[1.0, 2.0]]), bad, Squares(), None)  # type: ignore[arg-type]


def test_an_m_that_divides_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match="m=4 divides the inputs of no layer"):
        pruned(linear([[1.0, 2.0]]), [], n=2)
