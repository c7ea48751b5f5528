"""English sentences from the documentation that ships with Python."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from qpipe_zoo.optional import optional

_BREAK = re.compile(r"(?<=[.?!])\s+(?=[A-Z])")
_PLAIN = re.compile(r"[A-Z][A-Za-z ,;'()-]{30,200}[.?!]")
_KEYS = ("input_ids", "attention_mask", "token_type_ids")


def sentences(half: int) -> list[str]:
    """Return the sentences without code of every second topic, from the first (0) or the second (1)."""
    from pydoc_data.topics import topics

    found: list[str] = []
    for name in sorted(topics)[half::2]:
        paragraphs = (" ".join(part.split()) for part in topics[name].split("\n\n") if part[:1].isalpha())
        for paragraph in paragraphs:
            found += [s for s in _BREAK.split(paragraph) if _PLAIN.fullmatch(s)]
    return found


def tokens(tokenizer: Any, sentences: Sequence[str], length: int) -> list[dict[str, Tensor]]:  # noqa: ANN401
    """Return the tokens of each sentence, cut or padded to length."""
    encoded = tokenizer(
        list(sentences), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    return [{key: encoded[key][i] for key in _KEYS} for i in range(len(sentences))]


class Sentences(LightningDataModule):
    """Serve tokens of sentences in Python's language reference: half of its topics calibrate, half evaluate.

    Batches are dicts of input_ids, attention_mask and token_type_ids [B, length].

    Args:
        batch_size: sentences a batch.
        length: tokens a sentence is cut or padded to.
        num_calibration, num_evaluation: sentences of each part.
    """

    def __init__(
        self, batch_size: int = 16, length: int = 32, num_calibration: int = 256, num_evaluation: int = 128
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.length = length
        self.counts = (num_calibration, num_evaluation)

    def setup(self, stage: str | None = None) -> None:
        """Collect the sentences and tokenize them."""
        from qpipe_zoo.model.minilm import minilm_folder

        transformers = optional("transformers", "data=sentences")
        tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder(), local_files_only=True)
        halves = (sentences(0), sentences(1))
        self.parts = [
            tokens(tokenizer, half[:count], self.length)
            for half, count in zip(halves, self.counts, strict=True)
        ]

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return the calibration sentences, shuffled."""
        return DataLoader(self.parts[0], self.batch_size, shuffle=True)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return the evaluation sentences."""
        return DataLoader(self.parts[1], self.batch_size)  # type: ignore[arg-type]
