"""Train the network of the default job and write its checkpoint into the package.

    python scripts/train_resnet_digits.py

Takes half a minute on one CPU core. Shifts by up to one pixel are the only augmentation.
"""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from qpipe_zoo.data.digits import Digits
from qpipe_zoo.model.resnet_digits import resnet_digits
from safetensors.torch import save_file
from torch import Tensor

WEIGHTS = Path(__file__).parent.parent / "plugins/qpipe_zoo/weights/resnet_digits.safetensors"
EPOCHS = 40


def shifted(x: Tensor) -> Tensor:
    """Move each batch by up to one pixel each way; what leaves is lost."""
    rows, columns = torch.randint(0, 3, (2,)).tolist()
    return F.pad(x, (1, 1, 1, 1))[..., rows : rows + 8, columns : columns + 8]


class Training(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = resnet_digits(pretrained=False).train()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return F.cross_entropy(self.model(shifted(batch[0])), batch[1], label_smoothing=0.05)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        hits = self.model(batch[0]).argmax(-1) == batch[1]
        self.log("top1_percent", 100.0 * hits.float().mean(), batch_size=len(hits))

    test_step = validation_step

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.01)
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS),
        }


def main() -> None:
    pl.seed_everything(0)
    training, data = Training(), Digits()
    trainer = pl.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", logger=False, enable_checkpointing=False, log_every_n_steps=1
    )
    trainer.fit(training, data)
    trainer.test(training, data)
    WEIGHTS.parent.mkdir(exist_ok=True)
    save_file(training.model.state_dict(), WEIGHTS)
    WEIGHTS.chmod(0o644)


if __name__ == "__main__":
    main()
