"""Fine-tuning (paper section 4.1): a classifier on top of a pre-trained encoder, or of the same one untrained."""

from dataclasses import dataclass
from pathlib import Path

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import random_seed

from simmimlib.batches import INTERPOLATIONS, Batches, training_batches, validation_batches
from simmimlib.checkpoints import export_timm, load_simmim, save_weights
from simmimlib.data import labelled_subset, open_packed
from simmimlib.encoders import create_encoder
from simmimlib.launch import launch
from simmimlib.optim import parameter_groups, scale_rate
from simmimlib.runtime import autocast, pick_device, rank, resolve_precision, sum_over_ranks, write_csv, write_json
from simmimlib.settings import one_of, require
from simmimlib.training import Training, TrainSettings

VALIDATION_BATCH = 500  # images at a time, over all devices


@dataclass
class FinetuneSettings(TrainSettings):
    """Settings of a run; every value is explained in the parameters cell of ``notebooks/03_finetune.ipynb``."""

    checkpoint: str = ""
    labels: int = 100
    epochs: int = 60
    batch_size: int = 20
    base_lr: float = 0.05
    warmup_epochs: float = 5.0
    layer_decay: float = 1.0
    crop_scale: float = 0.67
    auto_augment: str = ""
    color_jitter: float = 0.0
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.1
    interpolation: str = "bilinear"
    val_crop: float = 1.0
    eval_epochs: int = 20
    out: str = "results/try/finetune"

    def check(self):
        super().check()
        one_of("interpolation", self.interpolation, INTERPOLATIONS)
        for name in ("val_crop", "layer_decay"):
            require(0 < getattr(self, name) <= 1, name, getattr(self, name), "above 0 and at most 1")
        for name in ("erase", "mixup", "cutmix", "color_jitter"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "from 0 to 1")
        require(0 <= self.smoothing < 1, "smoothing", self.smoothing, "from 0 to below 1")
        require(self.labels >= 0, "labels", self.labels, "0 (every training image) or more")
        require(self.epochs > 0, "epochs", self.epochs, "1 or more")
        require(self.eval_epochs > 0, "eval_epochs", self.eval_epochs, "1 or more")
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

    Uses every GPU there is (``launch.py``). A run that was stopped or killed goes on where it was (``training.py``).

    Args:
        on_epoch: called after each epoch with the list of log rows so far, for a live curve (with one device only).

    Returns:
        The metrics; ``top1`` is the last epoch's, in percent, ``top1_best`` the best epoch's.
    """
    return launch(_finetune, settings, on_epoch)


def _finetune(settings: FinetuneSettings, on_epoch=None) -> dict:
    data, out = open_packed(settings.data), Path(settings.out)
    require(len(data.val.images) > 0, "data", settings.data, "a set with validation images (val/ or test/)")
    require(len(data.classes) > 1, "data", settings.data, "a set with two classes or more")
    device, classes = pick_device(), len(data.classes)
    dtype = resolve_precision(settings.precision, device)
    random_seed(settings.seed)
    model = settings.model(data.channels, classes).to(device)
    split = data.train
    if settings.labels:
        generator = torch.Generator().manual_seed(settings.seed)
        split = split.select(labelled_subset(split.labels, settings.labels, generator))
    batches = training_batches(settings, split, data, device)
    validation = validation_batches(
        data.val,
        data,
        settings.image_size,
        VALIDATION_BATCH,
        device,
        centre=settings.val_crop,
        interpolation=settings.interpolation,
        files=settings.source == "files",
    )
    rate = scale_rate(settings.base_lr, settings.batch_size)
    groups = parameter_groups(model, rate, settings.weight_decay, settings.layer_decay)
    mix, criterion = None, LabelSmoothingCrossEntropy(settings.smoothing)
    if settings.mixup or settings.cutmix:
        require(batches.batch_size % 2 == 0, "labels", settings.labels, "even with mixup or cutmix if below a batch")
        mix = Mixup(settings.mixup, settings.cutmix, label_smoothing=settings.smoothing, num_classes=classes)
        criterion = SoftTargetCrossEntropy()
    erase = RandomErasing(settings.erase, mode="pixel", device=device)

    def augment(images, labels):
        images = erase(images)
        return mix(images, labels) if mix else (images, labels)

    def loss(model, images, labels):
        return criterion(model(images), labels)

    def validate(epoch):
        nonlocal confusion
        if epoch % settings.eval_epochs and epoch < settings.epochs:
            return {}
        confusion = evaluate(model, validation, classes, dtype)
        return {"top1": 100 * confusion.diag().sum().item() / confusion.sum().item()}

    confusion = None
    with Training(
        "finetune", settings, data, batches, model, groups, dtype, loss, augment, settings.checkpoint
    ) as training:
        rows = training.run(validate, on_epoch)
        metrics = {
            "top1": rows[-1]["top1"],
            "top1_best": max(row["top1"] for row in rows if "top1" in row),
            "loss": rows[-1]["loss"],
            "labels": len(split.images),
            **training.metrics(),
            "data": data.name,
        }
        if confusion is None:  # the run went on after its last epoch
            confusion = evaluate(model, validation, classes, dtype)
        if rank() == 0:
            save_weights(out / "model.safetensors", model)
            write_csv(out / "confusion.csv", confusion.numpy(), data.classes)
            write_json(out / "metrics.json", metrics)
    return metrics


@torch.inference_mode()
def evaluate(model, batches: Batches, num_classes: int, dtype) -> torch.Tensor:
    """Confusion matrix [true class, predicted class] of counts over all processes, on the CPU."""
    model.eval()
    counts = torch.zeros(num_classes, num_classes, dtype=torch.long, device=batches.device)
    for images, labels in batches:
        if not len(images):
            continue  # of several processes one may have no share of the last batch
        with autocast(batches.device, dtype):
            predicted = model(images).argmax(1)
        counts.view(-1).index_add_(0, labels * num_classes + predicted, torch.ones_like(labels))
    return sum_over_ranks(counts).cpu()
