"""Fine-tuning (paper section 4.1): a classifier on top of a pre-trained encoder, or of the same one untrained."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import random_seed

from simmimlib.batches import Batches, TransformBatches
from simmimlib.checkpoints import export_timm, load_simmim
from simmimlib.data import Packed, labelled_subset, open_packed
from simmimlib.encoders import create_encoder
from simmimlib.optim import SCHEDULES, create_optimizer, create_schedule, parameter_groups, scale_rate
from simmimlib.runtime import (
    PRECISIONS,
    Progress,
    autocast,
    pick_device,
    provenance,
    resolve_precision,
    whole_file,
    write_csv,
    write_json,
)
from simmimlib.settings import Settings, one_of, require


@dataclass
class FinetuneSettings(Settings):
    """Settings of a run; every value is explained in the parameters cell of ``notebooks/03_finetune.ipynb``."""

    data: str = "mnist5k"
    checkpoint: str = ""
    encoder: str = "vit_tiny_patch16_224"
    encoder_kwargs: dict = field(default_factory=lambda: {"patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3})
    image_size: int = 32
    labels: int = 100
    epochs: int = 20
    batch_size: int = 50
    base_lr: float = 2.0e-3
    base_warmup_lr: float = 1.0e-6
    base_min_lr: float = 1.0e-6
    warmup_epochs: float = 2.0
    schedule: str = "cosine"
    step_epoch: int = 0
    weight_decay: float = 0.05
    layer_decay: float = 0.8
    drop_path: float = 0.0
    clip_norm: float = 5.0
    crop_scale: float = 0.67
    flip: bool = False
    auto_augment: str = ""
    color_jitter: float = 0.0
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.1
    interpolation: str = "bilinear"
    val_crop: float = 1.0
    eval_epochs: int = 1
    precision: str = "auto"
    seed: int = 0
    out: str = "results/try/finetune"

    def check(self):
        one_of("schedule", self.schedule, SCHEDULES)
        one_of("precision", self.precision, PRECISIONS)
        one_of("interpolation", self.interpolation, ("bilinear", "bicubic"))
        for name in ("crop_scale", "val_crop", "layer_decay"):
            require(0 < getattr(self, name) <= 1, name, getattr(self, name), "above 0 and at most 1")
        for name in ("erase", "mixup", "cutmix", "color_jitter", "drop_path"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "from 0 to 1")
        require(0 <= self.smoothing < 1, "smoothing", self.smoothing, "from 0 to below 1")
        require(self.labels >= 0, "labels", self.labels, "0 (every training image) or more")
        require(self.epochs > 0, "epochs", self.epochs, "1 or more")
        require(self.eval_epochs > 0, "eval_epochs", self.eval_epochs, "1 or more")
        require(self.batch_size > 0, "batch_size", self.batch_size, "1 or more")
        mixes = self.mixup > 0 or self.cutmix > 0
        require(not mixes or self.batch_size % 2 == 0, "batch_size", self.batch_size, "even with mixup or cutmix")
        if not self.checkpoint:
            with torch.device("meta"):
                create_encoder(self.encoder, self.image_size, **self.encoder_kwargs)
        elif not Path(self.checkpoint).is_file():
            raise ValueError(f"checkpoint = {self.checkpoint!r}: there is no such file (empty = from scratch)")

    def model(self, in_chans: int, num_classes: int) -> torch.nn.Module:
        """A timm classifier, mean-pooled, with the weights of the checkpoint's encoder or of an untrained one."""
        if self.checkpoint:
            encoder = load_simmim(self.checkpoint).encoder
            require(encoder.config["in_chans"] == in_chans, "data", self.data, "of the checkpoint's channel count")
        else:
            encoder = create_encoder(self.encoder, self.image_size, in_chans, **self.encoder_kwargs)
        return export_timm(encoder, num_classes, "avg", self.image_size, drop_path_rate=self.drop_path)


def finetune(settings: FinetuneSettings, on_epoch=None) -> dict:
    """Trains the classifier; writes ``metrics.json``, ``log.csv``, ``confusion.csv``, ``model.safetensors``.

    Args:
        on_epoch: called after each epoch with the list of log rows so far, for a live curve.

    Returns:
        The metrics; ``top1`` is the last epoch's, in percent, ``top1_best`` the best epoch's.
    """
    data, out = open_packed(settings.data), Path(settings.out)
    require(len(data.val.images) > 0, "data", settings.data, "a set with validation images (val/ or test/)")
    require(len(data.classes) > 1, "data", settings.data, "a set with two classes or more")
    device = pick_device()
    dtype = resolve_precision(settings.precision, device)
    random_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)  # which labels, order and crops
    model = settings.model(data.channels, len(data.classes)).to(device)
    split = data.train
    if settings.labels:
        split = split.select(labelled_subset(split.labels, settings.labels, generator))
    batches = training_batches(settings, split, data, device, generator)
    validation = Batches(
        data.val, data, settings.image_size, 500, device, centre=settings.val_crop, interpolation=settings.interpolation
    )
    rate = scale_rate(settings.base_lr, settings.batch_size)
    optimizer = create_optimizer(parameter_groups(model, rate, settings.weight_decay, settings.layer_decay))
    schedule = create_schedule(optimizer, settings, len(batches))
    mix, criterion = None, LabelSmoothingCrossEntropy(settings.smoothing)
    if settings.mixup or settings.cutmix:
        smallest = min(settings.batch_size, len(split.images))
        require(smallest % 2 == 0, "labels", smallest, "even with mixup or cutmix, when they are less than a batch")
        mix = Mixup(settings.mixup, settings.cutmix, label_smoothing=settings.smoothing, num_classes=len(data.classes))
        criterion = SoftTargetCrossEntropy()
    erase = RandomErasing(settings.erase, mode="pixel", device=device)

    rows, step = [], 0
    progress = Progress("finetune", settings.epochs, len(batches) * settings.batch_size)
    for epoch in range(1, settings.epochs + 1):
        model.train()
        total = torch.zeros((), device=device)
        for images, labels in batches:
            schedule.step_update(step)
            images = erase(images)
            if mix:
                images, labels = mix(images, labels)
            with autocast(device, dtype):
                loss = criterion(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
            optimizer.step()
            total += loss.detach()
            step += 1
            progress.step(len(images))
        row = {"epoch": epoch, "loss": total.item() / len(batches), "lr": optimizer.param_groups[-1]["lr"]}
        if epoch % settings.eval_epochs == 0 or epoch == settings.epochs:
            confusion = evaluate(model, validation, len(data.classes), dtype)
            row["top1"] = 100 * confusion.diag().sum().item() / confusion.sum().item()
        rows.append(row)
        progress.epoch(rows[-1])
        if on_epoch:
            on_epoch(rows)
    progress.close()

    metrics = {
        "top1": rows[-1]["top1"],
        "top1_best": max(row["top1"] for row in rows if "top1" in row),
        "loss": rows[-1]["loss"],
        "labels": len(split.images),
        "images_seen": progress.images,
        "images_per_second": progress.images / progress.seconds,
        "wall_seconds": progress.seconds,
        "data": data.name,
        "seed": settings.seed,
        **provenance(device, dtype),
    }
    save_model(out / "model.safetensors", model)
    write_csv(out / "log.csv", rows)
    write_csv(out / "confusion.csv", confusion.numpy(), data.classes)
    write_json(out / "metrics.json", metrics)
    return metrics


def training_batches(settings: FinetuneSettings, split, data: Packed, device, generator):
    if settings.auto_augment or settings.color_jitter:
        return TransformBatches(split, data, settings, device, generator)
    return Batches(
        split,
        data,
        settings.image_size,
        settings.batch_size,
        device,
        generator,
        scale=settings.crop_scale,
        flip=settings.flip,
        interpolation=settings.interpolation,
    )


@torch.inference_mode()
def evaluate(model, batches, num_classes: int, dtype) -> torch.Tensor:
    """Confusion matrix [true class, predicted class] of counts, on the CPU."""
    model.eval()
    counts = torch.zeros(num_classes, num_classes, dtype=torch.long, device=batches.device)
    for images, labels in batches:
        with autocast(batches.device, dtype):
            predicted = model(images).argmax(1)
        counts.view(-1).index_add_(0, labels * num_classes + predicted, torch.ones_like(labels))
    return counts.cpu()


def save_model(path, model) -> None:
    from safetensors.torch import save_file

    with whole_file(path) as temporary:
        save_file(model.state_dict(), temporary)
