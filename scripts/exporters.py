"""Write docs/exporters.md: what becomes of every quantizer in every exporter; every pair is run.

A pair is exported for real, and so proved in the exporter's engine, or refused with the sentence a user would
get. `--check` compares. An exporter whose extra is not installed keeps its column.
"""

from __future__ import annotations

import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qpipe import Artifact, ExportContext, QuantSpec, Recipe, RecipeError, Role, Task, quantize
from qpipe.choices import build_recipe, library_config
from qpipe.config import conf_dir
from qpipe.proof import latencies_ms
from qpipe.registry import PluginRegistry

PAGE = Path(__file__).resolve().parent.parent / "docs" / "exporters.md"
HEAD = """# Quantizers and exporters

Written by `python scripts/exporters.py`, which runs every pair on a convolution and a linear layer (for
`compressed_tensors`, on a language model of one block); a test compares.

- **both**: weights and activations quantized; the engine executed the file, proved against the simulation.
- **weights**: so with `activation=null` only; the number says why not with activations.
- *in float32*: weights are stored as codes packed to their bits, and computed in float32: small, not fast.
- A number alone: neither. The sentences below are the command's own answers, `…` the quantizer's name.

"""
SAMPLES = 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(4, 16, 3), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(torch.relu(self.conv(x)).flatten(1))
        return logits


def convolutional() -> tuple[nn.Module, list[Any], Task]:
    torch.manual_seed(0)
    return Net().eval(), [torch.randn(SAMPLES, 4, 4, 4)], Task()


def language() -> tuple[nn.Module, list[Any], Task]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes, num_key_value_heads=2)).eval()
    return model, [{"input_ids": torch.randint(40, (SAMPLES, 6))}], Task()


MODELS = {"compressed_tensors": language}
MODES: dict[str, dict[str, Any]] = {"both": {}, "weights": {"activation": None}}


@dataclass(frozen=True)
class Row:
    """A word for quantizer= (or several that come to the same), and the bits and signs it needs."""

    words: tuple[str, ...]
    weight: Mapping[str, Any] = field(hash=False)

    def label(self) -> str:
        named = {"num_bits": 8, "symmetric": True, "signed": True, "restricted": True}
        said = [f"weight.{key}={str(x).lower()}" for key, x in self.weight.items() if named[key] != x]
        return ", ".join(f"`{word}`" for word in self.words) + "".join(f" `{word}`" for word in said)


@cache
def registry() -> PluginRegistry:
    return PluginRegistry.load_installed()


def rows() -> list[Row]:
    """Return every registered quantizer and preset; presets that only choose a calibrator share a row."""
    presets = sorted(path.stem for path in (conf_dir() / "quantizer").glob("*.yaml"))
    found: dict[str, list[str]] = {}
    for word in [*registry().names("quantizer"), *presets]:
        quantizer = library_config({"quantizer": word}, exporting=False)["quantizer"]
        found.setdefault(str(quantizer), []).append(word)
    return [Row(tuple(words), _weight(words[0])) for words in sorted(found.values())]


def _weight(word: str) -> dict[str, Any]:
    """Return the first width and signs the quantizer takes."""
    choice = library_config({"quantizer": word}, exporting=False)["quantizer"]
    quantizer = registry().create("quantizer", choice)
    is_affine = quantizer.is_affine(QuantSpec(role=Role.WEIGHT))
    for symmetric, num_bits in product((True, False), (8, 4, 6, 2, 1) if is_affine else (4, 8, 6, 2, 1)):
        signs = {"symmetric": symmetric, "signed": symmetric, "restricted": symmetric}
        with suppress(RecipeError):
            quantizer.check(QuantSpec(role=Role.WEIGHT, num_bits=num_bits, **signs))
            return {"num_bits": num_bits, **signs}
    raise SystemExit(f"quantizer '{word}' takes none of the widths that are tried")


def recipe(row: Row, mode: str, exporter: str) -> Recipe:
    """Return what the command would build.

    Raises:
        RecipeError: the sentence it would answer.
    """
    return build_recipe(
        library_config({**choices(row, mode), "exporter": [exporter]}, exporting=True), registry()
    )


def choices(row: Row, mode: str) -> dict[str, Any]:
    return {"quantizer": row.words[0], "weight": dict(row.weight), "transform": [], **MODES[mode]}


@cache
def calibrated(row: Row, mode: str, make: Any) -> ExportContext:  # noqa: ANN401
    model, batches, task = make()
    built = build_recipe(library_config(choices(row, mode), exporting=False), registry())
    simulation, _ = quantize(model, batches, task=task, evaluator=[], exporter=[], **choices(row, mode))
    return ExportContext(simulation, model, batches, task, built, Path())


def exported(row: Row, mode: str, exporter: str) -> Artifact:
    """Export one pair.

    Raises:
        RecipeError: the sentence the command would answer.
    """
    made = recipe(row, mode, exporter)
    context = calibrated(row, mode, MODELS.get(exporter, convolutional))
    with tempfile.TemporaryDirectory() as folder:
        [chosen] = made.exporters
        given = (context.simulation, context.reference, context.batches, context.task, made)
        return chosen.export(ExportContext(*given, Path(folder)))


@dataclass(frozen=True)
class Cell:
    """What is said of one pair, and the sentences it refers to."""

    text: str
    sentences: tuple[str, ...] = ()


def cell(row: Row, exporter: str) -> tuple[Cell, str]:
    """Run one pair; return what to say of it, and the engine."""
    refused: list[str] = []
    for mode in MODES:
        try:
            artifact = exported(row, mode, exporter)
        except RecipeError as error:
            refused.append(_answer(error))
            continue
        precision = " *in float32*" if "float32" in str(artifact.proof.get("precision")) else ""
        return Cell(mode + precision, tuple(refused)), re.sub(r" \d\S*$", "", artifact.engine)
    return Cell("", tuple(dict.fromkeys(refused))), ""


def _answer(error: RecipeError) -> str:
    """Return an error without what differs between rows and columns."""
    text = re.sub(r"^exporter '\w+' cannot express this recipe: ", "", str(error))
    return re.sub(r"quantizer '\w+'", "quantizer '…'", text)


def column(exporter: str) -> list[Cell]:
    """Return the heading of an exporter, and what is said of it and each quantizer."""
    cells, engines = zip(*(cell(row, exporter) for row in rows()), strict=True)
    return [Cell(f"`{exporter}`: {', '.join(filter(None, dict.fromkeys(engines)))}"), *cells]


def kept() -> dict[str, list[Cell]]:
    """Return the columns of the page as it is, by exporter."""
    text = PAGE.read_text() if PAGE.exists() else ""
    sentences = dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    lines = [line.strip("|\n").split("|") for line in text.splitlines() if line.startswith("| ")]
    columns = [
        [
            Cell(
                re.sub(r"\[\d+\]", "", part).strip(),
                tuple(map(sentences.get, re.findall(r"\[(\d+)\]", part))),
            )
            for part in column
        ]
        for column in zip(*lines, strict=True)
    ]
    return {column[0].text.split("`")[1]: column for column in columns[1:]}


def page(exporters: list[str] | None = None) -> str:
    """Return the page; columns of exporters that are not named, or not installed, stay as they are."""
    chosen = registry().names("exporter") if exporters is None else exporters
    columns = kept() | {name: column(name) for name in chosen}
    first = [Cell("quantizer"), *(Cell(row.label()) for row in rows())]
    table = [*zip(first, *(columns[name] for name in sorted(columns)), strict=True)]
    numbers: dict[str, int] = {}
    lines = []
    for cells in table:
        said = [
            " ".join(filter(None, [part.text, *(f"[{number(numbers, s)}]" for s in part.sentences)]))
            for part in cells
        ]
        lines.append("| " + " | ".join(said) + " |")
    lines.insert(1, "|---" * len(table[0]) + "|")
    listed = [f"{index}. {sentence}" for sentence, index in numbers.items()]
    return HEAD + "\n".join([*lines, "", *listed]) + "\n"


def number(numbers: dict[str, int], sentence: str) -> int:
    return numbers.setdefault(sentence, len(numbers) + 1)


@contextmanager
def hurried() -> Iterator[None]:
    """Take three samples of each latency, and let torch translate its table of operations but once."""
    from onnxscript._framework_apis import torch_2_5 as framework

    listed, defaults = framework.get_torchlib_ops, latencies_ms.__defaults__
    framework.get_torchlib_ops, latencies_ms.__defaults__ = cache(listed), (0.0,)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        framework.get_torchlib_ops, latencies_ms.__defaults__ = listed, defaults


def main() -> int:
    logging.disable(logging.WARNING)
    with hurried():
        text = page()
    if "--check" in sys.argv:
        return int(PAGE.read_text() != text)
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
