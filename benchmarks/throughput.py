"""Training end to end on shards: images per second, and the share of the time spent waiting for data.

    python benchmarks/throughput.py                                   ResNet-50, 224 pixels, on a GPU
    python benchmarks/throughput.py --encoder resnet18 --size 32 --batch 32 --images 256 --steps 6

Synthetic photographs (coloured clouds, as JPEG at short side 256) are packed and trained on by the same
classes as any run: bf16 on a GPU, channels last.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image

from simclr_pl import ContrastiveDataModule, Encoder, SimCLR
from simclr_pl.augment import simclr_imagenet
from simclr_pl.callbacks import ThroughputMonitor
from simclr_pl.data import ImageFolder, Shards
from simclr_pl.data.pack import pack_source


class Clock(Callback):
    """Images per second after the first ten steps, the device's work included."""

    def __init__(self, batch: int, skip: int) -> None:
        self.batch, self.skip, self.begin, self.steps = batch, skip, 0.0, 0

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: object) -> None:
        if trainer.global_step in (self.skip, trainer.max_steps):
            if module.device.type == "cuda":
                torch.cuda.synchronize()
            if trainer.global_step == self.skip:
                self.begin = time.perf_counter()
            else:
                seconds = time.perf_counter() - self.begin
                rate = self.batch * (trainer.max_steps - self.skip) / seconds
                wait = float(trainer.callback_metrics.get("throughput/data", float("nan")))
                print(f"{rate:,.1f} images per second, {wait:.1%} of the time waiting for data")


def draw_clouds(root: Path, count: int) -> None:
    generator = np.random.default_rng(0)
    for i in range(count):
        small = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((341, 256), Image.Resampling.BICUBIC)
        path = root / f"{i % 10}" / f"{i:06}.jpg"
        path.parent.mkdir(exist_ok=True)
        image.save(path, quality=90)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", default="resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--images", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=110)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        images, packed = Path(folder, "images"), Path(folder, "packed")
        images.mkdir()
        draw_clouds(images, given.images)
        pack_source(ImageFolder(str(images)), packed)
        data = ContrastiveDataModule(
            Shards(str(packed)),
            given.batch,
            augment=simclr_imagenet(given.size),
            resident="none",
        )
        on_gpu = torch.cuda.is_available()
        Trainer(
            max_steps=given.steps,
            precision="bf16-mixed" if on_gpu else "32-true",
            callbacks=[
                ThroughputMonitor(every_n_steps=1),
                Clock(given.batch, min(10, given.steps // 2)),
            ],
            limit_val_batches=0,
            log_every_n_steps=1,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(SimCLR(Encoder(given.encoder), warmup_epochs=0), datamodule=data)
