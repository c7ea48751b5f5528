from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from qpipe_methods.finetune.lsq import LSQ
from qpipe_methods.finetune.qat import QAT
from qpipe_zoo.task.classification import Classification
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from qpipe import DataError, RecipeError, Task
from qpipe.nn import weight_quantizers
from qpipe.pipeline import quantize
from qpipe.training import fake_quants, optimizer_class, reestimate


class Blobs(LightningDataModule):
    """Three classes of 12 numbers."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        y = torch.arange(96) % 3
        self.x = torch.randn(96, 12, generator=generator) + 2 * nn.functional.one_hot(y, 12)
        self.y = y

    def loader(self, shuffle: bool) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(self.x, self.y), 16, shuffle=shuffle)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self.loader(True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self.loader(False)


def network(norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    norms: list[nn.Module] = [nn.BatchNorm1d(8)] if norm else []
    return nn.Sequential(nn.Linear(12, 8), *norms, nn.ReLU(), nn.Linear(8, 3))


def trainer(epochs: int = 2, callbacks: list[Callback] | None = None, **words: Any) -> Trainer:  # noqa: ANN401
    words = {"enable_checkpointing": False, **words}
    return Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        callbacks=callbacks or [],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **words,
    )


def finetuned(*strategies: Any, model: nn.Module | None = None, with_: Trainer | None = None) -> nn.Module:  # noqa: ANN401
    torch.manual_seed(0)
    tuned, _ = quantize(
        model or network(),
        Blobs(),
        task=Classification(),
        trainer=with_ or trainer(),
        finetune=list(strategies),
        transform=[],
        evaluator=[],
        target="generic",
        weight={"num_bits": 4},
    )
    return tuned


def weight_of(model: nn.Module) -> Tensor:
    """Return the first layer's weight as it is stored, not as its quantizer shows it."""
    return model.state_dict()["0.weight"]


class CountSteps(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:  # noqa: ANN401
        self.losses.append(float(rest[0]["loss"]))


def test_training_lowers_the_loss_and_ends_plain_and_in_eval() -> None:
    steps = CountSteps()
    tuned = finetuned({"name": "lsq", "lr": 0.01}, with_=trainer(8, [steps]))
    assert sum(steps.losses[-6:]) < 0.7 * sum(steps.losses[:6])
    assert not any(module.training for module in tuned.modules())
    for fake_quant in fake_quants(tuned):
        assert fake_quant.learner is None
        assert not list(fake_quant.parameters())
        assert fake_quant.scale.shape[1:] == (1,)


def test_two_strategies_train_one_after_the_other_for_their_own_epochs() -> None:
    steps = CountSteps()
    finetuned("qat", {"name": "lsq", "epochs": 3}, with_=trainer(2, [steps]))
    assert len(steps.losses) == (2 + 3) * 6


def test_pruned_weights_stay_zero_unless_told_otherwise() -> None:
    for keep, expected in ((True, 0), (False, 4 * 12)):
        model = network()
        with torch.no_grad():
            model[0].weight[:4] = 0
            model[0].bias[:4] = 0.1  # alive, so that the gradient is not zero
        tuned = finetuned({"name": "qat", "keep_zeros": keep}, model=model)
        assert int(weight_of(tuned)[:4].count_nonzero()) == expected


@pytest.mark.parametrize("mode", ["train", "freeze", "reestimate"])
def test_batch_norm_is_trained_frozen_or_estimated_again(mode: str) -> None:
    model = network(norm=True)
    model[1].running_mean.fill_(0.25)
    tuned = finetuned({"name": "qat", "batch_norm": mode}, model=model)
    mean = tuned.get_buffer("1.running_mean")
    means = [tuned[0](x).mean(0) for x, _ in Blobs().train_dataloader()]
    plain = torch.stack(means).mean(0).detach()
    assert (mean == 0.25).all().item() is (mode == "freeze")
    assert torch.allclose(mean, plain, atol=3e-3) is (mode == "reestimate")
    assert tuned[1].momentum == 0.1


def test_reestimated_statistics_are_plain_means() -> None:
    norm = nn.BatchNorm1d(2)
    batches = [torch.tensor([[0.0, 1.0], [2.0, 3.0]]), torch.tensor([[10.0, 1.0], [10.0, 3.0]])]
    reestimate(norm, batches, Task())
    assert norm.running_mean.tolist() == [5.5, 2.0]
    assert norm.running_var.tolist() == [1.0, 2.0]


class CutAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *rest: Any) -> None:  # noqa: ANN401
        if trainer.global_step == self.step:
            raise KeyError("cut")


@pytest.mark.parametrize(
    "strategy",
    [
        {"name": "lsq"},
        {"name": "prune"},
        {"name": "gradual", "bits": [8]},
        {"name": "qat", "ranges": "moving"},
    ],
)
def test_the_same_command_goes_on_from_the_last_epoch_and_ends_alike(
    strategy: dict[str, Any], tmp_path: Path
) -> None:
    saved = {**strategy, "resume": str(tmp_path / "saved")}
    whole = finetuned(strategy, model=network(norm=True), with_=trainer(3))
    with pytest.raises(KeyError, match="cut"):
        finetuned(saved, model=network(norm=True), with_=trainer(3, [CutAt(14)]))
    seen = CountSteps()
    resumed = finetuned(saved, model=network(norm=True), with_=trainer(3, [seen]))
    rounds = 2 if strategy["name"] == "gradual" else 1
    assert len(seen.losses) == 6 + (rounds - 1) * 18  # of the cut training two epochs were done
    state = resumed.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in whole.state_dict().items())
    seen.losses.clear()
    again = finetuned(saved, model=network(norm=True), with_=trainer(3, [seen]))
    assert torch.equal(weight_of(again), weight_of(whole))
    assert len(seen.losses) == rounds * 6  # the last epoch is not saved


def test_another_training_or_a_damaged_file_is_not_gone_on_with(tmp_path: Path) -> None:
    finetuned({"name": "lsq", "resume": str(tmp_path)}, with_=trainer(2))
    with pytest.raises(RecipeError, match=r"last\.ckpt was saved by a training with other words"):
        finetuned({"name": "lsq", "resume": str(tmp_path), "lr": 0.1}, with_=trainer(2))
    with pytest.raises(RecipeError, match="other words"):
        finetuned({"name": "qat", "resume": str(tmp_path / "last.ckpt")}, with_=trainer(2))
    file = tmp_path / "last.ckpt"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(DataError, match=r"no checkpoint one can go on from .*delete it"):
        finetuned({"name": "lsq", "resume": str(tmp_path)}, with_=trainer(2))
    with pytest.raises(RecipeError, match=r"resume=no\.ckpt: there is no such file"):
        LSQ(resume="no.ckpt")


def stored(folder: Path, model: nn.Module, *strategies: Any, **words: Any) -> nn.Module:  # noqa: ANN401
    made, _ = quantize(
        model,
        Blobs(),
        task=Classification(),
        trainer=trainer(),
        finetune=list(strategies),
        evaluator=[],
        exporter=["safetensors"],
        target="generic",
        out=folder,
        **{"weight": {"num_bits": 4}, "calibrator": "mse", "transform": [], **words},
    )
    return made


@pytest.mark.parametrize("name", ["qat", "lsq", "lsq_plus", "pact"])
def test_training_starts_from_a_stored_artifact(name: str, tmp_path: Path) -> None:
    """After no epoch the model is the stored one bit for bit; weights whose code agrees keep their float."""
    start = stored(tmp_path / "ptq", network(), "gptq")
    before = finetuned({"name": name, "artifact": str(tmp_path / "ptq"), "epochs": 0})
    x = Blobs().x
    assert torch.equal(before(x), start(x))
    assert not torch.equal(before(x), finetuned({"name": name, "epochs": 0})(x))
    for weight, float_one in zip(weight_quantizers(before), (network()[0], network()[2]), strict=True):
        latent, codes = weight.blocks_input(), weight.fake_quant.codes(weight.blocks_input())
        same = weight.fake_quant.codes(float_one.weight) == codes
        assert 0 < (~same).sum() < same.sum()  # gptq moved some
        assert torch.equal(latent[same], float_one.weight[same])
        assert torch.equal(latent[~same], weight.fake_quant(latent)[~same])
    after = finetuned({"name": name, "artifact": str(tmp_path / "ptq"), "epochs": 1})
    assert not torch.equal(weight_of(after), weight_of(before))


def test_learned_levels_of_an_artifact_are_where_training_starts(tmp_path: Path) -> None:
    words = {"weight": {"num_bits": 2, "quantizer": "ternary"}}
    start = stored(tmp_path / "ttq", network(), "ttq", **words)
    strategy = {"name": "ttq", "artifact": str(tmp_path / "ttq"), "epochs": 0}
    again = stored(tmp_path / "again", network(), strategy, **words)
    assert torch.equal(again(Blobs().x), start(Blobs().x))
    assert not torch.equal(again[0].weight_quantizer.extra_negative, again[0].weight_quantizer.scale)


class Unread(Blobs):
    """Says when it is read."""

    def loader(self, shuffle: bool) -> DataLoader[tuple[Tensor, ...]]:
        raise AssertionError("data was read")


def refused(*strategies: Any, data: LightningDataModule | None = None, **words: Any) -> None:  # noqa: ANN401
    torch.manual_seed(0)
    given: dict[str, Any] = {
        "model": network(),
        "task": Classification(),
        "transform": [],
        "target": "generic",
    }
    given |= {"weight": {"num_bits": 4}, "evaluator": [], **words}
    quantize(given.pop("model"), data or Unread(), finetune=list(strategies), trainer=trainer(), **given)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"weight": {"num_bits": 8}}, "'0:weight' was stored in .* with num_bits=4, and this run has 8"),
        ({"granularity": "layer"}, "with granularity=channel, and this run has layer"),
        ({"quantizer": "log"}, "with quantizer=uniform, and this run has log"),
        (
            {"activation": {"symmetric": True}},
            "'input' was stored in .* symmetric=False, and this run has True",
        ),
        ({"activation": None}, "'input' was quantized when .* this run leaves it in floating point"),
        ({"model": nn.Sequential(nn.Linear(12, 3))}, "'2.weight' was stored, which Sequential does not have"),
    ],
)
def test_an_artifact_of_other_words_is_refused_before_data_is_read(
    words: dict[str, Any], says: str, tmp_path: Path
) -> None:
    stored(tmp_path / "ptq", network())
    with pytest.raises(RecipeError, match=says):
        refused({"name": "qat", "artifact": str(tmp_path / "ptq")}, **words)


def test_an_artifact_without_this_runs_transforms_is_refused_before_data_is_read(tmp_path: Path) -> None:
    norms = network(norm=True).eval()
    stored(tmp_path / "ptq", norms, transform=["fold_bn"])
    start = {"name": "qat", "artifact": str(tmp_path / "ptq"), "epochs": 0}
    with pytest.raises(RecipeError, match=r"'1' was taken out by a transform .* this run has transform=\[\]"):
        refused(start, model=network(norm=True))
    refused(start, model=network(norm=True), transform=["fold_bn"], data=Blobs())


@pytest.mark.parametrize(
    ("then", "now", "says"),
    [
        (
            {"layers": [{"match": "1", "activation": None}]},
            {},
            "edge '1' is quantized either here or as stored, not in both; start with",
        ),
        (
            {},
            {"model": nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3))},
            r"stored with shape \[8\]",
        ),
        (
            {"norm": True},
            {"transform": ["fold_bn"]},
            r"'1\.\w+' is stored with shape .*has none; give .* after the same transforms",
        ),
    ],
)
def test_other_edges_or_shapes_are_refused_before_calibration(
    then: dict[str, Any],
    now: dict[str, Any],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = {**then}
    norm = words.pop("norm", False)
    stored(tmp_path / "ptq", network(norm=norm), **words)
    monkeypatch.setattr("qpipe.pipeline.calibrate", None)
    with pytest.raises(RecipeError, match=says):
        refused(
            {"name": "qat", "artifact": str(tmp_path / "ptq")},
            data=Blobs(),
            **{"model": network(norm=norm), **now},
        )


def test_an_artifact_that_is_none_or_damaged_is_refused_before_data_is_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"artifact=.*holds no stored codes"):
        QAT(artifact=str(tmp_path))
    stored(tmp_path / "ptq", network())
    file = tmp_path / "ptq" / "safetensors" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(RecipeError, match=r"artifact=.*is not the file its manifest was written for"):
        refused({"name": "qat", "artifact": str(tmp_path / "ptq")})


def test_bits_that_another_strategy_chooses_are_not_held_against_an_artifact(tmp_path: Path) -> None:
    allocate = {"name": "allocate", "budget": {"average_bits": 4}, "bits": [2, 8], "num_samples": 16}
    start = stored(tmp_path / "ptq", network(), allocate)
    train = {"name": "qat", "artifact": str(tmp_path / "ptq"), "epochs": 0}
    assert torch.equal(finetuned(allocate, train)(Blobs().x), start(Blobs().x))


class Own(LightningModule):
    """Trains itself."""

    def training_step(self, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        return None


@pytest.mark.parametrize(
    ("name", "words", "says"),
    [
        ("lsq", {"quantizer": "log"}, "use quantizer=uniform, or finetune=qat"),
        (
            "gradual",
            {"quantizer": "codebook"},
            "'gradual' learns the scale of affine codes, which no quantizer",
        ),
        ("dsq", {"weight": {"quantizer": "apot"}, "activation": None}, "which no quantizer here has"),
        ("lsq", {"weight": None, "activation": {"dynamic": True}}, "which no quantizer here has"),
        ("ttq", {}, "there are none; use weight.quantizer=ternary"),
        ("pact", {"activation": None}, "'pact' learns where activations are clipped"),
        ("ewgs", {"model": Own()}, r"give finetune\.ewgs\.delta"),
        ({"name": "qat", "distill": {"weight": 1.0}}, {"model": Own()}, "distill cannot add to its loss"),
    ],
)
def test_what_a_method_cannot_learn_is_refused_before_data_is_read(
    name: Any,  # noqa: ANN401
    words: dict[str, Any],
    says: str,
) -> None:
    with pytest.raises(RecipeError, match=says):
        refused(name, **words)


@pytest.mark.parametrize("name", ["distill", "qat", "lsq"])
def test_training_without_a_loss_is_refused_before_data_is_read(name: str) -> None:
    with pytest.raises(RecipeError, match=f"finetune '{name}' needs a loss, and Task has none"):
        refused(name, task=Task())


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_resumed_training_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    def saving(*callbacks: Callback) -> Trainer:
        every_epoch = ModelCheckpoint(tmp_path / str(len(callbacks)), "{epoch}", save_top_k=-1)
        return trainer(4, [every_epoch, *callbacks], enable_checkpointing=True)

    whole = finetuned("lsq", with_=saving())
    checkpoint = str(tmp_path / "0" / "epoch=1.ckpt")
    seen = CountSteps()
    resumed = finetuned({"name": "lsq", "resume": checkpoint}, with_=saving(seen))
    assert len(seen.losses) == 2 * 6
    # the order of the batches differs, nothing else: the schedule and Adam's moments go on
    start = torch.load(checkpoint, weights_only=True)["state_dict"]["model.0.weight"]
    a, b = weight_of(whole), weight_of(resumed)
    assert (a - b).norm() < 0.5 * (a - start).norm()


def test_averaged_weights_are_lightnings() -> None:
    plain = weight_of(finetuned("lsq", with_=trainer(2)))
    averaged = weight_of(finetuned("lsq", with_=trainer(2, [EMAWeightAveraging(decay=0.999)])))
    start = weight_of(network())
    assert 0 < (averaged - start).norm() < 0.5 * (plain - start).norm()  # after the first step, nearly still


def test_early_stopping_watches_the_tasks_metric() -> None:
    steps = CountSteps()
    stop = EarlyStopping("val_top1_percent", mode="max", patience=1, min_delta=200)
    finetuned("qat", with_=trainer(20, [steps, stop]))
    assert len(steps.losses) == 2 * 6


def test_mixed_precision_trains() -> None:
    steps = CountSteps()
    tuned = finetuned({"name": "lsq", "lr": 0.01}, with_=trainer(8, [steps], precision="bf16-mixed"))
    assert sum(steps.losses[-6:]) < 0.8 * sum(steps.losses[:6])
    assert all(fake_quant.scale.dtype is torch.float32 for fake_quant in fake_quants(tuned))


class OwnSteps(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(x)
        return result

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ANN401
        self.steps += 1
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_lightning_module_keeps_its_own_steps() -> None:
    tuned = finetuned("lsq", model=OwnSteps())
    assert isinstance(tuned, OwnSteps)
    assert tuned.steps == 2 * 6
    with pytest.raises(RecipeError, match="distill cannot add"):
        finetuned({"name": "lsq", "distill": {"weight": 0.5}}, model=OwnSteps())


def test_a_task_without_loss_learns_from_the_float_model_alone() -> None:
    def tune(weight: float) -> nn.Module:
        strategy = {"name": "qat", "distill": {"weight": weight}}
        tuned, _ = quantize(
            network(), Blobs(), trainer=trainer(), finetune=[strategy], evaluator=[], target="generic"
        )
        return tuned

    assert not torch.equal(weight_of(tune(1.0)), weight_of(network()))
    with pytest.raises(RecipeError, match=r"Task has none.*distill\.weight=1"):
        tune(0.5)


def test_nothing_to_train_on_is_one_sentence() -> None:
    class Unlabelled(LightningDataModule):
        def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
            return Blobs().val_dataloader()

    with pytest.raises(RecipeError, match="Unlabelled has no train_dataloader"):
        quantize(network(), Unlabelled(), task=Classification(), finetune=["qat"], trainer=trainer())


def test_unknown_words_are_refused_with_a_suggestion() -> None:
    with pytest.raises(ValueError, match="did you mean 'epochs'"):
        QAT(epoch=3)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="schedule is one of cosine, constant"):
        LSQ(schedule="linear")  # type: ignore[arg-type]
    for word, value in (
        ("lr", "fast"),
        ("lr", -1),
        ("weight_decay", None),
        ("epochs", 1.5),
        ("compile", "yes"),
    ):
        with pytest.raises(ValueError, match=f"{word} is .*, not {value!r}"):
            LSQ(**{word: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no optimizer 'adam'"):
        optimizer_class("adam")


def test_optimizers_take_their_own_arguments() -> None:
    assert optimizer_class({"name": "SGD", "momentum": 0.9}) == (torch.optim.SGD, {"momentum": 0.9})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_compiled_training_agrees_with_eager() -> None:
    eager = weight_of(finetuned("lsq"))
    compiled = weight_of(finetuned({"name": "lsq", "compile": True}))
    assert torch.allclose(eager, compiled, atol=1e-4)


def test_two_processes_share_the_data_and_end_alike(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import pytorch_lightning as pl, torch
        from test_training import Blobs, CountSteps, network
        from qpipe.pipeline import quantize
        from qpipe.training import fake_quants
        from qpipe_zoo.task.classification import Classification

        steps = CountSteps()
        pl.seed_everything(0)
        trainer = pl.Trainer(
            accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False, callbacks=[steps],
            use_distributed_sampler=False, enable_checkpointing=False, enable_progress_bar=False,
        )
        tuned, _ = quantize(network(), Blobs(), task=Classification(), trainer=trainer, finetune=["lsq"],
                            transform=[], evaluator=[], target="generic", weight={{"num_bits": 4}})
        state = {{"losses": steps.losses, "weight": tuned[0].weight.detach()}}
        state["scales"] = torch.cat([f.scale.flatten() for f in fake_quants(tuned)])
        torch.save(state, sys.argv[1] + f"/rank{{trainer.global_rank}}.pt")
        """)
    )
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert len(first["losses"]) == 2 * 3  # half of the six batches of each epoch
    assert first["losses"] != second["losses"]
    assert torch.equal(first["weight"], second["weight"])
    assert torch.equal(first["scales"], second["scales"])
