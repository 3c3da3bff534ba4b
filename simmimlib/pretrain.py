"""Pre-training (paper section 4.1): predict what the mask hides, on images without labels."""

from dataclasses import dataclass
from pathlib import Path

import torch
from timm.utils import random_seed

from simmimlib.batches import normaliser, training_batches, validation_batches
from simmimlib.checkpoints import save_simmim
from simmimlib.data import Packed, open_packed
from simmimlib.encoders import create_encoder
from simmimlib.heads import HEADS
from simmimlib.launch import launch
from simmimlib.losses import LOSSES, SCOPES
from simmimlib.masking import STRATEGIES, MaskGenerator, avg_dist
from simmimlib.optim import parameter_groups, scale_rate
from simmimlib.runtime import autocast, pick_device, rank, resolve_precision, sum_over_ranks, write_json
from simmimlib.settings import one_of, require
from simmimlib.simmim import SimMIM
from simmimlib.targets import TARGETS, ClusterTarget
from simmimlib.training import Training, TrainSettings

VALIDATION_IMAGES = 1000  # the validation loss is taken on the first so many images, with the same masks each time


@dataclass
class PretrainSettings(TrainSettings):
    """Settings of a run; every value is explained in the parameters cell of ``notebooks/02_pretrain.ipynb``."""

    mask_patch_size: int = 8
    mask_ratio: float = 0.4
    mask_strategy: str = "random"
    head: str = "linear"
    loss: str = "l1"
    beta: float = 1.0
    scope: str = "masked"
    target: str = "pixels"
    resolution: float = 1.0
    base_lr: float = 0.064
    out: str = "results/try/pretrain"

    # of the crops: what the official code does, and no settings here
    interpolation, auto_augment, color_jitter = "bilinear", "", 0.0

    def check(self):
        super().check()
        one_of("head", self.head, HEADS)
        one_of("loss", self.loss, LOSSES)
        one_of("scope", self.scope, SCOPES)
        one_of("target", self.target, TARGETS)
        one_of("mask_strategy", self.mask_strategy, STRATEGIES)
        require(0 < self.mask_ratio <= 1, "mask_ratio", self.mask_ratio, "above 0 and at most 1")
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

    Uses every GPU there is (``launch.py``). A run that was stopped or killed goes on where it was (``training.py``).

    Args:
        on_epoch: called after each epoch with the list of log rows so far, for a live curve (with one device only).

    Returns:
        The metrics.
    """
    return launch(_pretrain, settings, on_epoch)


def _pretrain(settings: PretrainSettings, on_epoch=None) -> dict:
    data, out = open_packed(settings.data), Path(settings.out)
    device = pick_device()
    dtype = resolve_precision(settings.precision, device)
    random_seed(settings.seed)
    model = settings.model(data.channels, data.mean, data.std).to(device)
    masks = settings.masks(model.encoder.patch_size)
    batches = training_batches(settings, data.train, data, device, masks)
    if isinstance(model.target, ClusterTarget):
        model.target.fit(sample_images(data))
    rate = scale_rate(settings.base_lr, settings.batch_size)
    groups = parameter_groups(model, rate, settings.weight_decay, pretraining=True)

    with Training("pretrain", settings, data, batches, model, groups, dtype, masked_loss) as training:
        rows = training.run(on_epoch=on_epoch)
        metrics = {
            "loss": rows[-1]["loss"] if rows else None,
            **training.metrics(),
            "val_loss": validation_loss(model, masks, data, settings, device, dtype),
            "avg_dist": avg_dist(masks(64, torch.Generator().manual_seed(0)), model.encoder.patch_size).mean().item(),
            "parameters": sum(p.numel() for p in model.parameters()),
            "data": data.name,
        }
        if rank() == 0:
            save_simmim(out / "model.safetensors", model)
            write_json(out / "metrics.json", metrics)
    return metrics


def masked_loss(model: SimMIM, images: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    return model(images, masks).loss


def sample_images(data: Packed) -> torch.Tensor:
    """2,000 training images at most, normalised, the same for every seed: the colour clusters are fitted on them."""
    rows = torch.linspace(0, len(data.train.images) - 1, min(2000, len(data.train.images))).long().numpy()
    images = torch.from_numpy(data.train.images[rows]).permute(0, 3, 1, 2).float()
    mean, std = normaliser(data, images.device)
    return (images - mean) / std


@torch.inference_mode()
def validation_loss(model: SimMIM, masks, data: Packed, settings: PretrainSettings, device, dtype) -> float | None:
    """The run's own loss on validation images, under masks that are the same for every model; None without images."""
    if not len(data.val.images):
        return None
    model.eval()
    split = data.val.select(slice(VALIDATION_IMAGES))
    total = torch.zeros((), device=device)
    for images, mask in validation_batches(split, data, settings.image_size, settings.batch_size, device, masks):
        if len(images):  # of several processes one may have no share of the last batch
            with autocast(device, dtype):
                total += model(images, mask).loss * len(images)
    return sum_over_ranks(total).item() / len(split.images)


@torch.inference_mode()
def reconstruct(model: SimMIM, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Predicted pixels [B, C, H, W] of normalised images under a mask, in evaluation mode."""
    return model.eval()(images, mask).prediction.float()
