"""Pre-training (paper section 4.1): predict what the mask hides, on images without labels."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from timm.utils import random_seed

from simmimlib.batches import Batches
from simmimlib.checkpoints import save_simmim
from simmimlib.data import Packed, open_packed
from simmimlib.encoders import create_encoder
from simmimlib.heads import HEADS
from simmimlib.losses import LOSSES, SCOPES
from simmimlib.masking import STRATEGIES, MaskGenerator, avg_dist
from simmimlib.optim import SCHEDULES, create_optimizer, create_schedule, parameter_groups, scale_rate
from simmimlib.runtime import (
    PRECISIONS,
    Progress,
    autocast,
    pick_device,
    provenance,
    resolve_precision,
    write_csv,
    write_json,
)
from simmimlib.settings import Settings, one_of, require
from simmimlib.simmim import SimMIM
from simmimlib.targets import TARGETS, ClusterTarget

VALIDATION_IMAGES = 1000  # the validation loss is taken on the first so many images, with the same masks each time


@dataclass
class PretrainSettings(Settings):
    """Settings of a run; every value is explained in the parameters cell of ``notebooks/02_pretrain.ipynb``."""

    data: str = "mnist5k"
    encoder: str = "vit_tiny_patch16_224"
    encoder_kwargs: dict = field(default_factory=lambda: {"patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3})
    image_size: int = 32
    mask_patch_size: int = 8
    mask_ratio: float = 0.6
    mask_strategy: str = "random"
    head: str = "linear"
    loss: str = "l1"
    beta: float = 1.0
    scope: str = "masked"
    target: str = "pixels"
    resolution: float = 1.0
    epochs: int = 10
    batch_size: int = 128
    base_lr: float = 2.0e-4
    base_warmup_lr: float = 1.0e-6
    base_min_lr: float = 1.0e-5
    warmup_epochs: float = 1.0
    schedule: str = "cosine"
    step_epoch: int = 0
    weight_decay: float = 0.05
    drop_path: float = 0.0
    clip_norm: float = 5.0
    crop_scale: float = 0.67
    flip: bool = False
    precision: str = "auto"
    seed: int = 0
    out: str = "results/try/pretrain"

    def check(self):
        one_of("head", self.head, HEADS)
        one_of("loss", self.loss, LOSSES)
        one_of("scope", self.scope, SCOPES)
        one_of("target", self.target, TARGETS)
        one_of("mask_strategy", self.mask_strategy, STRATEGIES)
        one_of("schedule", self.schedule, SCHEDULES)
        one_of("precision", self.precision, PRECISIONS)
        require(0 < self.mask_ratio <= 1, "mask_ratio", self.mask_ratio, "above 0 and at most 1")
        require(0 < self.crop_scale <= 1, "crop_scale", self.crop_scale, "above 0 and at most 1")
        require(self.epochs >= 0, "epochs", self.epochs, "0 (no training: the untouched initial encoder) or more")
        require(self.batch_size > 0, "batch_size", self.batch_size, "1 or more")
        with torch.device("meta"):  # names and sizes that do not fit stop here, before any data is read
            self.masks(self.model().encoder.patch_size)

    def model(self, in_chans=3, mean=0.5, std=0.25) -> SimMIM:
        """The untrained model; ``mean`` and ``std`` are the data set's."""
        kwargs = {"drop_path_rate": self.drop_path, **self.encoder_kwargs}
        encoder = create_encoder(self.encoder, self.image_size, in_chans, **kwargs)
        parts = (self.head, self.loss, self.scope, self.target, self.beta, self.resolution)
        return SimMIM(encoder, *parts, mean=mean, std=std)

    def masks(self, model_patch_size: int) -> MaskGenerator:
        return MaskGenerator(
            self.image_size, self.mask_patch_size, model_patch_size, self.mask_ratio, self.mask_strategy
        )


def pretrain(settings: PretrainSettings, on_epoch=None) -> dict:
    """Trains from scratch and writes ``model.safetensors``, ``log.csv`` and ``metrics.json`` into ``settings.out``.

    Args:
        on_epoch: called after each epoch with the list of log rows so far, for a live curve.

    Returns:
        The metrics.
    """
    data, out = open_packed(settings.data), Path(settings.out)
    device = pick_device()
    dtype = resolve_precision(settings.precision, device)
    random_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)  # order, crops and masks
    model = settings.model(data.channels, data.mean, data.std).to(device)
    masks = settings.masks(model.encoder.patch_size)
    batches = Batches(
        data.train,
        data,
        settings.image_size,
        settings.batch_size,
        device,
        generator,
        scale=settings.crop_scale,
        flip=settings.flip,
    )
    if isinstance(model.target, ClusterTarget):
        model.target.fit(next(iter(sample_batches(data, settings, device)))[0])
    rate = scale_rate(settings.base_lr, settings.batch_size)
    groups = parameter_groups(model, rate, settings.weight_decay, pretraining=True)
    optimizer = create_optimizer(groups)
    schedule = create_schedule(optimizer, settings, len(batches))

    rows, step = [], 0
    progress = Progress("pretrain", settings.epochs, len(batches) * settings.batch_size)
    for epoch in range(1, settings.epochs + 1):
        model.train()
        total = torch.zeros((), device=device)  # summed on the device: no wait inside the epoch
        for images, _ in batches:
            schedule.step_update(step)
            with autocast(device, dtype):
                loss = model(images, masks(len(images), generator, device)).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
            optimizer.step()
            total += loss.detach()
            step += 1
            progress.step(len(images))
        rows.append({"epoch": epoch, "loss": total.item() / len(batches), "lr": optimizer.param_groups[0]["lr"]})
        progress.epoch(rows[-1])
        if on_epoch:
            on_epoch(rows)
    progress.close()

    metrics = {
        "loss": rows[-1]["loss"] if rows else None,
        "val_loss": validation_loss(model, masks, data, settings, device, dtype),
        "avg_dist": avg_dist(masks(64, torch.Generator().manual_seed(0)), model.encoder.patch_size).mean().item(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "images_seen": progress.images,
        "images_per_second": progress.images / progress.seconds if rows else None,
        "wall_seconds": progress.seconds,
        "data": data.name,
        "seed": settings.seed,
        **provenance(device, dtype),
    }
    save_simmim(out / "model.safetensors", model)
    write_csv(out / "log.csv", rows, columns=["epoch", "loss", "lr"])
    write_json(out / "metrics.json", metrics)
    return metrics


def sample_batches(data: Packed, settings: PretrainSettings, device) -> Batches:
    """One batch of 2,000 training images, the same for every seed: the colour clusters are fitted on it."""
    generator = torch.Generator().manual_seed(0)
    count = min(2000, len(data.train.images))
    return Batches(data.train, data, settings.image_size, count, device, generator)


@torch.inference_mode()
def validation_loss(model: SimMIM, masks, data: Packed, settings: PretrainSettings, device, dtype) -> float | None:
    """The run's own loss on validation images, under masks that are the same for every model; None without images."""
    if not len(data.val.images):
        return None
    model.eval()
    generator = torch.Generator().manual_seed(0)
    split = data.val.select(slice(VALIDATION_IMAGES))
    total = 0.0
    for images, _ in Batches(split, data, settings.image_size, settings.batch_size, device):
        with autocast(device, dtype):
            total += model(images, masks(len(images), generator, device)).loss.item() * len(images)
    return total / len(split.images)


@torch.inference_mode()
def reconstruct(model: SimMIM, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Predicted pixels [B, C, H, W] of normalised images under a mask, in evaluation mode."""
    return model.eval()(images, mask).prediction.float()
