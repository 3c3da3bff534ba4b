"""Batches for training and validation (paper section 4): cropped, flipped and normalised, on the device.

SimMIM's pre-training needs nothing but a random crop, a flip, a normalisation and a mask, so whole batches are made at
once where the model is, and no worker decodes or augments image by image (``PackedImages``). The faithful path, which
decodes each file anew in every epoch, and RandAugment do need workers (``workers.py``).
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from timm.data import create_transform
from torch import Tensor

from simmimlib.data.packed import Packed, Split
from simmimlib.data.packed_images import PackedImages
from simmimlib.data.streams import MASKS, ORDER, random_stream
from simmimlib.data.workers import TransformedImages
from simmimlib.machine.distributed import local_shard
from simmimlib.settings import require

SOURCES = ("packed", "files")
Masks = Callable[[int, torch.Generator | None, torch.device], Tensor]  # a MaskGenerator


class Recipe(Protocol):
    """What ``training_batches`` reads of a loop's settings, which ``train/settings.py`` explains."""

    image_size: int
    batch_size: int
    seed: int
    source: str
    crop_scale: float
    flip: bool
    interpolation: str
    auto_augment: str
    color_jitter: float


class Batches:
    """Batches of one split on the device.

    Args:
        split: whose labels and order.
        images: the source, ``PackedImages`` or ``TransformedImages``: called with an epoch and a list of (step, rows),
            it yields each step's images [B, C, H, W], normalised, on the device; of several processes each gets its
            share.
        batch_size: images a step, over all processes.
        device: where batches are.
        seed: shuffles, and drops an incomplete last batch; None reads everything in order.
        masks: a ``MaskGenerator``: batches are then (images, masks [B, h, w]), otherwise (images, labels [B]).
    """

    def __init__(
        self,
        split: Split,
        images: Callable[[int, list], Iterator[Tensor]],
        batch_size: int,
        device: torch.device,
        seed: int | None = None,
        masks: Masks | None = None,
    ):
        self.images, self.batch_size, self.device, self.seed, self.masks = images, batch_size, device, seed, masks
        self.labels = torch.from_numpy(np.array(split.labels))

    def __len__(self) -> int:
        whole, rest = divmod(len(self.labels), self.batch_size)
        return whole if self.seed is not None else whole + bool(rest)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch(0)

    def rows(self, epoch: int) -> list[Tensor]:
        """The rows of the split that each step of an epoch reads."""
        order = torch.arange(len(self.labels))
        if self.seed is not None:
            order = torch.randperm(len(order), generator=random_stream(self.seed, ORDER, epoch))
        return list(order.split(self.batch_size))[: len(self)]

    def epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the batches of an epoch from step ``first`` on."""
        steps = list(enumerate(self.rows(epoch)))[first:]
        for (step, rows), images in zip(steps, self.images(epoch, steps), strict=True):
            if self.masks is None:
                yield images, self.labels[local_shard(rows)].to(self.device, non_blocking=True)
            else:
                stream = random_stream(self.seed or 0, MASKS, epoch, step)
                yield images, local_shard(self.masks(len(rows), stream, self.device))


def training_batches(
    settings: Recipe,
    split: Split,
    packed: Packed,
    device: torch.device,
    masks: Masks | None = None,
) -> Batches:
    """Shuffled and augmented as a loop's settings (``train/settings.py``) say.

    Raises:
        ValueError: a batch that is larger than the set.
    """
    count = len(split)
    require(settings.batch_size <= count, "batch_size", settings.batch_size, f"at most {count}, the images to train on")
    if settings.source == "files" or settings.auto_augment or settings.color_jitter:
        rgba = packed.channels == 4 and settings.auto_augment
        require(not rgba, "auto_augment", settings.auto_augment, "empty for images of 4 channels")
        transform = create_transform(
            settings.image_size,
            is_training=True,
            scale=(settings.crop_scale, 1.0),
            hflip=0.5 * settings.flip,
            color_jitter=settings.color_jitter or None,  # type: ignore[arg-type]
            auto_augment=settings.auto_augment or None,
            interpolation=settings.interpolation,
            mean=packed.mean,  # type: ignore[arg-type]
            std=packed.std,  # type: ignore[arg-type]
        )
        images: Callable = TransformedImages(
            split, packed, device, transform, settings.source == "files", settings.seed
        )
    else:
        images = PackedImages(
            split,
            packed,
            settings.image_size,
            device,
            settings.seed,
            settings.crop_scale,
            settings.flip,
            interpolation=settings.interpolation,
        )
    return Batches(split, images, settings.batch_size, device, settings.seed, masks)


def validation_batches(
    split: Split,
    packed: Packed,
    image_size: int,
    batch_size: int,
    device: torch.device,
    masks: Masks | None = None,
    crop_pct: float = 1.0,
    interpolation: str = "bilinear",
    files: bool = False,
) -> Batches:
    """Every image once, in order, its centre crop; under ``masks`` that are the same each time."""
    if files:
        transform = create_transform(
            image_size,
            crop_pct=crop_pct,
            interpolation=interpolation,
            mean=packed.mean,  # type: ignore[arg-type]
            std=packed.std,  # type: ignore[arg-type]
        )
        images: Callable = TransformedImages(split, packed, device, transform, files)
    else:
        images = PackedImages(split, packed, image_size, device, crop_pct=crop_pct, interpolation=interpolation)
    return Batches(split, images, batch_size, device, masks=masks)


def evenly_spaced(split: Split, count: int) -> np.ndarray:
    """``count`` rows at most: image folders are in the order of their classes, so that the first ones are of one."""
    count = min(count, len(split))
    return np.arange(count) * (len(split) - 1) // max(1, count - 1)


def sample_images(split: Split, packed: Packed, image_size: int, count: int) -> Tensor:
    """``count`` images at most, evenly spaced over the split, to look at: normalised [n, C, H, W], on the CPU."""
    spaced = split.select(evenly_spaced(split, count))
    images, _ = next(iter(validation_batches(spaced, packed, image_size, count, torch.device("cpu"))))
    return images
