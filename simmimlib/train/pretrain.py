"""Pre-training (paper section 4.1): predict what the mask hides, on images without labels."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from simmimlib.data.batches import evenly_spaced, sample_images, training_batches, validation_batches
from simmimlib.data.packed import Packed, open_packed
from simmimlib.data.streams import WEIGHTS, seed_globals
from simmimlib.machine.device import autocast, pick_device
from simmimlib.machine.distributed import launch, rank, sum_over_ranks
from simmimlib.machine.files import write_json
from simmimlib.model.avgdist import avg_dist
from simmimlib.model.masking import MaskGenerator
from simmimlib.model.mim import MaskedImageModel
from simmimlib.model.targets import ClusterTarget
from simmimlib.train.loop import train
from simmimlib.train.optim import parameter_groups, scale_rate
from simmimlib.train.run import Run
from simmimlib.train.settings import PretrainSettings
from simmimlib.weights.checkpoints import save_model

VALIDATION_IMAGES = 1000  # that the validation loss is taken on, of all classes, with the same masks each time
CLUSTER_IMAGES = 2000  # training images that the colour clusters are fitted on, the same for every seed


def pretrain(settings: PretrainSettings, on_epoch: Callable | None = None) -> dict:
    """Trains from scratch; writes ``model.safetensors``, ``log.csv`` and ``metrics.json`` into ``settings.out``.

    Uses every GPU there is (``machine/distributed.py``). A run that was stopped or killed resumes (``resume.py``).

    Args:
        on_epoch: called after each epoch with the list of log rows so far, for a live curve (with one device only).

    Returns:
        The metrics.
    """
    return launch(_pretrain, settings, on_epoch)


def _pretrain(settings: PretrainSettings, on_epoch: Callable | None = None) -> dict:
    data, out, device = open_packed(settings.data), Path(settings.out), pick_device()
    seed_globals(device, settings.seed, WEIGHTS)
    model = settings.model(data.channels, data.mean, data.std).to(device)
    masks = settings.masks(model.encoder.patch_size)
    batches = training_batches(settings, data.train, data, device, masks)
    if isinstance(model.target, ClusterTarget):
        model.target.fit(sample_images(data.train, data, data.size, CLUSTER_IMAGES))
    rate = scale_rate(settings.base_lr, settings.batch_size)
    groups = parameter_groups(model, rate, settings.weight_decay, pretraining=True)
    with Run("pretrain", settings, data, batches, model, groups, masked_loss) as run:
        rows = train(run, on_epoch=on_epoch)
        metrics = {
            "loss": rows[-1]["loss"] if rows else None,
            **run.metrics(),
            "val_loss": validation_loss(model, masks, data, settings, run.dtype),
            "avg_dist": avg_dist(masks(64, torch.Generator().manual_seed(0)), model.encoder.patch_size).mean().item(),
            "parameters": sum(p.numel() for p in model.parameters()),
            "data": data.name,
            "data_digest": data.digest,
        }
        if rank() == 0:
            save_model(out / "model.safetensors", model)
            write_json(out / "metrics.json", metrics)
    return metrics


def masked_loss(model: MaskedImageModel, images: Tensor, masks: Tensor) -> Tensor:
    return model(images, masks).loss


@torch.inference_mode()
def validation_loss(
    model: MaskedImageModel, masks: MaskGenerator, data: Packed, settings: PretrainSettings, dtype: torch.dtype
) -> float | None:
    """The run's own loss on validation images, under masks that are the same for every model; None without images."""
    if not len(data.val):
        return None
    model.eval()
    split = data.val.select(evenly_spaced(data.val, VALIDATION_IMAGES))
    device = next(model.parameters()).device
    total = torch.zeros((), device=device)
    for images, mask in validation_batches(split, data, settings.image_size, settings.batch_size, device, masks):
        if len(images):  # of several processes one may have no share of the last batch
            with autocast(device, dtype):
                total += model(images, mask).loss * len(images)
    return sum_over_ranks(total).item() / len(split)


@torch.inference_mode()
def reconstruct(model: MaskedImageModel, images: Tensor, mask: Tensor) -> Tensor:
    """Predicted pixels [B, C, H, W] of normalised images under a mask, in evaluation mode."""
    return model.eval()(images, mask).prediction.float()
