"""Anyone's own text, in blocks of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from qpipe import DataError, RecipeError
from qpipe_zoo.model.hf import read_where
from qpipe_zoo.optional import optional, quietly

SUFFIXES = frozenset({".txt", ".md", ".rst"})
_Block = dict[str, Tensor]


class Text(LightningDataModule):
    """Serve blocks of tokens: the first half of the text calibrates, the second evaluates.

    Batches are dicts of input_ids [B, length] and label [B]: 0 for this text, 1 for the other one, which is
    evaluated too. Blocks are taken evenly from their half.

    Args:
        path: a file, or a folder whose .txt, .md and .rst files are read in order of their names.
        tokenizer: a folder or .gguf file, by default the model's.
        other: a file or folder of another kind of text, evaluated beside the second half.
        batch_size: blocks a batch.
        length: tokens a block.
        num_calibration, num_evaluation: blocks of each half; the other text gives as many as the latter.

    Raises:
        RecipeError: a file or folder does not exist, or a number is no count.
    """

    def __init__(
        self,
        path: str,
        tokenizer: str | None,
        other: str | None = None,
        batch_size: int = 1,
        length: int = 256,
        num_calibration: int = 64,
        num_evaluation: int = 32,
    ) -> None:
        super().__init__()
        counts = {
            "batch_size": batch_size,
            "num_calibration": num_calibration,
            "num_evaluation": num_evaluation,
        }
        for name, value in {"length": length, **counts}.items():
            if type(value) is not int or value < 1 + (name == "length"):
                raise RecipeError(
                    f"data.{name}={value} is no such count; give a whole number, data.{name}=32"
                )
        if tokenizer is None:
            raise RecipeError("data.tokenizer has no value; name a folder with a tokenizer, data.tokenizer=…")
        self.where = read_where(tokenizer, "data.tokenizer")
        self.paths = {"data.path": _existing(path, "data.path")}
        if other is not None:
            self.paths["data.other"] = _existing(other, "data.other")
        self.batch_size = batch_size
        self.length = length
        self.counts = (num_calibration, num_evaluation)
        self.parts: list[list[_Block]] = []

    def setup(self, stage: str | None = None) -> None:
        """Read the texts and cut their tokens to blocks.

        Raises:
            DataError: a text is shorter than the blocks it must give.
        """
        if self.parts:
            return
        transformers = optional("transformers", "data=text", "llm")
        try:
            with quietly(transformers):
                tokenizer = transformers.AutoTokenizer.from_pretrained(**self.where, local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(f"data.tokenizer holds no tokenizer transformers reads: {reason}") from None
        own = self._blocks(tokenizer, "data.path", 2)
        half = len(own) // 2
        self.parts = [_spread(own[:half], self.counts[0], 0), _spread(own[half:], self.counts[1], 0)]
        if "data.other" in self.paths:
            self.parts.append(_spread(self._blocks(tokenizer, "data.other", 1), self.counts[1], 1))

    def _blocks(self, tokenizer: Any, key: str, least: int) -> Tensor:  # noqa: ANN401  # transformers'
        """Return the text's tokens [blocks, length]; what is left over is dropped."""
        tokens = tokenizer(_read(self.paths[key]), add_special_tokens=False, verbose=False)["input_ids"]
        count = len(tokens) // self.length
        if count < least:
            raise DataError(
                f"{key}={self.paths[key]} gives {len(tokens)} tokens, fewer than {least} blocks of "
                f"data.length={self.length}; give more text or shorter blocks"
            )
        return torch.tensor(tokens[: count * self.length]).view(count, self.length)

    def train_dataloader(self) -> DataLoader[_Block]:
        """Return blocks of the first half, shuffled."""
        return DataLoader(self.parts[0], self.batch_size, shuffle=True)  # type: ignore[arg-type]

    def test_dataloader(self) -> list[DataLoader[_Block]]:
        """Return blocks of the second half, then those of the other text."""
        return [DataLoader(part, self.batch_size) for part in self.parts[1:]]  # type: ignore[arg-type]


def _existing(path: str, key: str) -> Path:
    found = Path(path).expanduser()
    if not found.exists():
        raise RecipeError(f"{key}={path}: there is no such file or folder")
    if found.is_dir() and not any(p.suffix.lower() in SUFFIXES for p in found.rglob("*")):
        raise RecipeError(f"{key}={path} holds no text ({', '.join(sorted(SUFFIXES))})")
    return found


def _read(path: Path) -> str:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
    try:
        return "\n\n".join(file.read_text(encoding="utf-8") for file in files)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text in UTF-8: {error}") from None


def _spread(blocks: Tensor, count: int, label: int) -> list[_Block]:
    """Return count blocks, or all there are, evenly spaced."""
    chosen = torch.linspace(0, len(blocks) - 1, min(count, len(blocks))).round().long()
    return [{"input_ids": block, "label": torch.tensor(label)} for block in blocks[chosen]]
