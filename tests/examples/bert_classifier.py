r"""A BERT that tells two kinds of sentences apart, as a user would bring it.

python -m qpipe model._target_=bert_classifier.BertClassifier model.weights=bert.safetensors \
        data._target_=bert_classifier.Reviews task=classification
"""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertModel

WORDS, LENGTH = 64, 12


class BertClassifier(nn.Module):
    """Two small BERT layers and a linear classifier over the first token."""

    def __init__(self, num_labels: int = 2) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=WORDS,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=LENGTH,
        )
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(32, num_labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.classifier(hidden[:, 0])


class Reviews(pl.LightningDataModule):
    """Sentences of word numbers: label 1 when word 1 comes more often than word 2; batches are dicts."""

    def __init__(self, num_samples: int = 256, batch_size: int = 32) -> None:
        super().__init__()
        self.num_samples = num_samples
        self.batch_size = batch_size

    def _sentences(self, seed: int) -> DataLoader[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        words = torch.randint(0, 8, (self.num_samples, LENGTH), generator=generator)
        lengths = torch.randint(6, LENGTH + 1, (self.num_samples, 1), generator=generator)
        mask = (torch.arange(LENGTH) < lengths).long()
        labels = ((words == 1) * mask).sum(1) > ((words == 2) * mask).sum(1)
        rows = zip(words, mask, labels.long(), strict=True)
        samples = [{"input_ids": w, "attention_mask": m, "labels": y} for w, m, y in rows]
        return DataLoader(samples, self.batch_size)

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self._sentences(0)

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self._sentences(1)
