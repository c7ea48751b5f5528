from __future__ import annotations

import inspect
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from qpipe_zoo.data.digits import Digits
from qpipe_zoo.data.images import Images
from qpipe_zoo.data.photos import CALIBRATION, EVALUATION, IMAGENET, Photos, read_photo
from qpipe_zoo.data.sentences import Sentences
from qpipe_zoo.image import normalize, resize, square
from qpipe_zoo.model.efficientnet_lite0 import conv_bn, efficientnet_lite0
from qpipe_zoo.model.minilm import minilm
from qpipe_zoo.model.resnet_digits import resnet_digits
from qpipe_zoo.optional import optional, package_folder
from qpipe_zoo.task.classification import Classification

from qpipe import DataError, PluginError

ZOO = Path(inspect.getfile(Digits)).parent.parent


@pytest.mark.parametrize("path", sorted(ZOO.glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}={p.stem}")
def test_every_key_of_a_yaml_is_an_argument(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# ")
    config = yaml.safe_load(text)
    module, _, name = config.pop("_target_").rpartition(".")
    config.pop("defaults", None)
    config.pop("calibration", None)
    assert set(config) <= set(inspect.signature(getattr(import_module(module), name)).parameters)


def test_digits_are_split_once_and_for_all_and_the_network_reads_them() -> None:
    data = Digits()
    data.setup()
    parts = {name: [x.numpy().tobytes() for x, _ in part] for name, part in data.datasets.items()}
    assert {name: len(part) for name, part in parts.items()} == {"train": 1097, "val": 200, "test": 500}
    assert not set(parts["train"]) & set(parts["test"])
    task, model = Classification(), resnet_digits()
    assert sum(p.numel() for p in model.parameters()) < 80_000
    assert sum(p.numel() for p in resnet_digits(pretrained=False).parameters()) < 80_000
    metric = task.metrics()["top1_percent"]
    losses = []
    with torch.inference_mode():
        for batch in data.test_dataloader():
            output = model(batch[0])
            metric.update(output, batch)
            losses.append(task.loss(output, batch).item())
    assert metric.compute().item() == pytest.approx(99.4)
    assert sum(losses) / len(losses) < 0.4  # trained with label smoothing


def test_batch_norm_was_trained() -> None:
    model = resnet_digits()
    assert model.stem.bn.running_mean.abs().max() > 0.1


@pytest.mark.parametrize(
    ("photo", "classes"),
    [
        ("skimage:coffee.png", {967}),  # espresso
        ("skimage:chelsea.png", {281, 282, 285}),  # tabby, tiger cat, Egyptian cat
        ("skimage:camera.png", {872}),  # tripod
        ("skimage:motorcycle_left.png", {665, 670}),  # moped, motor scooter
    ],
)
def test_efficientnet_knows_what_photos_show(photo: str, classes: set[int]) -> None:
    with torch.inference_mode():
        logits = efficientnet_lite0()(normalize(resize(square(read_photo(photo)), 224))[None])
    assert logits.argmax().item() in classes


@pytest.mark.parametrize(("kernel", "size"), [(3, 8), (5, 8), (3, 14), (5, 14)])
def test_padding_is_tensorflows(kernel: int, size: int) -> None:
    layer = conv_bn(1, 1, kernel, stride=2, relu=False).eval()
    x = torch.randn(1, 1, size, size)
    out = -(-size // 2)
    total = max((out - 1) * 2 + kernel - size, 0)  # tf.nn: "SAME"
    before = total // 2
    padded = F.pad(x, (before, total - before, before, total - before))
    expected = F.conv2d(padded, layer.conv.weight, stride=2) / (1 + 1e-3) ** 0.5
    torch.testing.assert_close(layer(x), expected)


def test_photos_are_split_by_photo_and_always_the_same() -> None:
    assert not set(CALIBRATION) & set(EVALUATION)
    first, second = Photos(size=64), Photos(size=64)
    first.setup()
    second.setup()
    assert len(first.datasets["evaluation"]) == 256
    x = first.datasets["evaluation"][17]
    assert x.shape == (3, 64, 64)
    assert -127 / 128 <= x.min() < x.max() <= 1
    assert torch.equal(x, second.datasets["evaluation"][17])


def test_varied_crops_calibrate_only_and_stay_pictures() -> None:
    plain, varied = Photos(size=64), Photos(size=64, varied=True)
    plain.setup()
    varied.setup()
    assert torch.equal(plain.datasets["evaluation"][3], varied.datasets["evaluation"][3])
    crops = [torch.stack([data.datasets["calibration"][i] for i in range(16)]) for data in (plain, varied)]
    assert -127 / 128 <= crops[1].min() < crops[1].max() <= 1
    means = [x.mean((2, 3)).std().item() for x in crops]  # over crops and colours
    assert means[1] > means[0]
    assert torch.equal(crops[1][5], varied.datasets["calibration"][5])
    assert plain.fingerprint() != varied.fingerprint()


@pytest.mark.skipif(find_spec("foolbox") is None, reason="extra 'zoo'")
def test_photos_of_imagenet_are_what_their_names_say() -> None:
    data = Photos(size=224, source="imagenet")
    data.setup()
    assert len(data.datasets["calibration"].photos) == 20
    assert len(data.datasets["evaluation"].photos) == 18
    with torch.inference_mode():
        squares = [normalize(resize(square(photo), 224)) for photo in data.datasets["calibration"].photos]
        found = efficientnet_lite0()(torch.stack(squares)).argmax(1).tolist()
    labels = [int(name.rpartition("_")[2].removesuffix(".jpg")) for name in IMAGENET]
    assert sum(a == b for a, b in zip(found, labels, strict=True)) >= 17
    with pytest.raises(ValueError, match="scikit, imagenet"):
        Photos(source="x")


def test_own_pictures(tmp_path: Path) -> None:
    from PIL import Image

    with pytest.raises(DataError, match="holds 0 pictures"):
        Images(str(tmp_path)).setup()
    for i in range(3):
        Image.new("L", (40, 30), 127 + i).save(tmp_path / f"{i}.png")
    data = Images(str(tmp_path), size=16)
    data.setup()
    assert [len(batch) for batch in data.train_dataloader()] == [2]
    [batch] = data.test_dataloader()
    torch.testing.assert_close(batch, torch.full((1, 3, 16, 16), 1 / 128))
    (tmp_path / "1.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"1\.png cannot be read"):
        list(data.test_dataloader())


def test_minilm_tells_sentences_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QPIPE_CACHE", str(tmp_path))
    data, model = Sentences(num_calibration=48, num_evaluation=32), minilm()
    data.setup()
    assert [len(part) for part in data.parts] == [48, 32]
    batch: dict[str, Any] = next(iter(data.test_dataloader()))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "all-MiniLM-L6-v2", local_files_only=True)
    words = ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "Interest rates rose again."]
    with torch.inference_mode():
        assert model(**batch).shape == (16, 384)
        cat, kitten, rates = model(**tokenizer(words, padding=True, return_tensors="pt"))
    assert cat @ kitten > 0.5 > 0.2 > cat @ rates


def test_a_missing_package_names_the_extra() -> None:
    for find in (optional, package_folder):
        with pytest.raises(
            PluginError, match=r"data=x needs the package 'absent_x'; pip install 'qpipe-quant\[zoo\]'"
        ):
            find("absent_x", "data=x")
