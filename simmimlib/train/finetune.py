"""Fine-tuning (paper section 4.1): a classifier on top of a pre-trained encoder, or of the same one untrained."""

from collections.abc import Callable
from pathlib import Path

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from simmimlib.data.batches import Batches, training_batches, validation_batches
from simmimlib.data.packed import labelled_subset, open_packed
from simmimlib.data.streams import CLASSIFIER, WEIGHTS, seed_globals
from simmimlib.machine.device import autocast, pick_device
from simmimlib.machine.distributed import launch, rank, sum_over_ranks, world_size
from simmimlib.machine.files import write_csv, write_json
from simmimlib.settings import require
from simmimlib.train.loop import train
from simmimlib.train.optim import parameter_groups, scale_rate
from simmimlib.train.run import Run
from simmimlib.train.settings import FinetuneSettings
from simmimlib.weights.checkpoints import save_weights
from simmimlib.weights.export import export_timm

VALIDATION_BATCH = 500  # images at a time, over all devices


def finetune(settings: FinetuneSettings, on_epoch: Callable | None = None) -> dict:
    """Trains the classifier; writes ``metrics.json``, ``log.csv``, ``confusion.csv``, ``model.safetensors``.

    Uses every GPU there is (``machine/distributed.py``). A run that was stopped or killed resumes (``resume.py``).
    Runs of one seed share the classifier's initial weights, the labelled images and their order, whatever encoder they
    start from.

    Args:
        on_epoch: called after each epoch with the list of log rows so far, for a live curve (with one device only).

    Returns:
        The metrics; ``top1`` is the last epoch's, in percent, ``top1_best`` that of the best of the ``validated``
        epochs.
    """
    return launch(_finetune, settings, on_epoch)


def _finetune(settings: FinetuneSettings, on_epoch: Callable | None = None) -> dict:
    data, out, device = open_packed(settings.data), Path(settings.out), pick_device()
    require(len(data.val) > 0, "data", settings.data, "a set with validation images (val/ or test/)")
    require(len(data.classes) > 1, "data", settings.data, "a set with two classes or more")
    if settings.mixup or settings.cutmix:  # which pair the images of a process
        pairs, allowed = 2 * world_size(), f"a multiple of {2 * world_size()} with mixup or cutmix"
        require(settings.batch_size % pairs == 0, "batch_size", settings.batch_size, allowed)
    model = classifier(settings, data.channels, len(data.classes), device)
    split = data.train
    if settings.labelled_images:
        split = split.select(labelled_subset(split.labels, settings.labelled_images, settings.seed))
    batches = training_batches(settings, split, data, device)
    cut = {"crop_pct": settings.crop_pct, "interpolation": settings.interpolation, "files": settings.source == "files"}
    validation = validation_batches(
        data.val,
        data,
        settings.image_size,
        VALIDATION_BATCH,
        device,
        **cut,  # type: ignore[arg-type]
    )
    loss, augment = recipe(settings, len(data.classes), device)
    rate = scale_rate(settings.base_lr, settings.batch_size)
    groups = parameter_groups(model, rate, settings.weight_decay, settings.layer_decay)
    confusion = None

    def validate(epoch: int) -> dict:
        nonlocal confusion
        if epoch % settings.eval_epochs and epoch < settings.epochs:
            return {}
        confusion = evaluate(model, validation, len(data.classes), run.dtype)
        return {"top1": 100 * confusion.diag().sum().item() / confusion.sum().item()}

    with Run("finetune", settings, data, batches, model, groups, loss, augment, settings.checkpoint) as run:
        rows = train(run, validate, on_epoch)
        validated = [row["top1"] for row in rows if "top1" in row]
        metrics = {
            "top1": rows[-1]["top1"],
            "top1_best": max(validated),
            "validated": len(validated),
            "loss": rows[-1]["loss"],
            "labelled_images": len(split),
            **run.metrics(),
            "data": data.name,
            "data_digest": data.digest,
        }
        if confusion is None:  # the run was resumed after its last epoch
            confusion = evaluate(model, validation, len(data.classes), run.dtype)
        if rank() == 0:
            save_weights(out / "model.safetensors", model)
            write_csv(out / "confusion.csv", confusion.numpy(), data.classes)
            write_json(out / "metrics.json", metrics)
    return metrics


def classifier(settings: FinetuneSettings, in_chans: int, num_classes: int, device: torch.device) -> nn.Module:
    """A timm classifier, mean-pooled, with the weights of the checkpoint's encoder or of an untrained one."""
    seed_globals(device, settings.seed, WEIGHTS)
    encoder = settings.start(in_chans)
    seed_globals(device, settings.seed, CLASSIFIER)
    model = export_timm(encoder, num_classes, "avg", settings.image_size, drop_path_rate=settings.drop_path)
    return model.to(device)


def recipe(settings: FinetuneSettings, num_classes: int, device: torch.device) -> tuple[Callable, Callable]:
    """The loss (model, images, labels) -> scalar, and the augmentation of a batch (images, labels) -> the same."""
    mix, criterion = None, LabelSmoothingCrossEntropy(settings.smoothing)
    if settings.mixup or settings.cutmix:
        mix = Mixup(settings.mixup, settings.cutmix, label_smoothing=settings.smoothing, num_classes=num_classes)
        criterion = SoftTargetCrossEntropy()  # type: ignore[assignment]
    erase = RandomErasing(settings.random_erasing, mode="pixel", device=device)

    def augment(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images = erase(images)
        return mix(images, labels) if mix else (images, labels)

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return criterion(model(images), labels)

    return loss, augment


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Batches, num_classes: int, dtype: torch.dtype) -> Tensor:
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
