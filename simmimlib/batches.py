"""Batches for training and validation (paper section 4): cropped, flipped and normalised, on the device.

SimMIM's pre-training needs nothing but a random crop, a flip and a normalisation, so whole batches are made at once
where the model is, and no worker decodes or augments image by image. Fine-tuning with RandAugment does need workers.
"""

import os
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from simmimlib.data import Packed, Split


def normaliser(packed: Packed, device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation as [1, C, 1, 1] tensors, for pixels in [0, 255]."""
    mean, std = (torch.tensor(v, device=device).view(1, -1, 1, 1) * 255 for v in (packed.mean, packed.std))
    return mean, std


def to_pixels(images: Tensor, packed: Packed) -> Tensor:
    """Normalised [B, C, H, W] back to [0, 1] pixels [B, H, W, C], for showing."""
    mean, std = normaliser(packed, images.device)
    return ((images.float() * std + mean) / 255).clamp(0, 1).permute(0, 2, 3, 1)


class Batches:
    """Batches of one split on the device: decoded, cropped, flipped and normalised there.

    On a GPU, a set that fits into half of the free memory is kept there as uint8; otherwise each batch is read through
    the memory map, so that memory does not grow with the set. Order, crops and flips come from ``generator`` and are
    drawn on the CPU, so they are the same on every device.

    Args:
        split: what to read.
        packed: the data set it belongs to.
        image_size: side of the images handed out.
        batch_size: images a batch.
        device: where batches are made.
        generator: shuffles and augments; None reads in order, with the centre crop of validation.
        scale: smallest share of the image's area that a random crop keeps; 1 turns cropping off.
        flip: flip half of the images horizontally.
        centre: centre crop where none is drawn, as a share of the shorter side (0.875 = 224 of 256).
        interpolation: ``"bilinear"`` or ``"bicubic"``.
    """

    def __init__(
        self,
        split,
        packed,
        image_size,
        batch_size,
        device,
        generator=None,
        scale=1.0,
        flip=False,
        centre=1.0,
        interpolation="bilinear",
    ):
        self.split, self.image_size, self.batch_size, self.device = split, image_size, batch_size, device
        self.generator, self.scale, self.flip, self.centre = generator, scale, flip, centre
        self.interpolation = interpolation
        self.mean, self.std = normaliser(packed, device)
        self.labels = torch.from_numpy(np.array(split.labels))
        self.sizes = torch.from_numpy(np.array(split.sizes)).float()
        self.resident = None
        if device.type == "cuda" and split.images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
            self.resident = torch.from_numpy(np.array(split.images)).to(device)

    def __len__(self):
        whole, rest = divmod(len(self.labels), self.batch_size)
        return whole if self.generator is not None and whole else whole + bool(rest)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields images [B, C, H, W], normalised, and labels [B]. Training drops an incomplete last batch."""
        count = len(self.labels)
        order = torch.randperm(count, generator=self.generator) if self.generator is not None else torch.arange(count)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            index = order[start : start + self.batch_size]
            yield self._images(index), self.labels[index].to(self.device, non_blocking=True)

    def _images(self, index: Tensor) -> Tensor:
        if self.resident is not None:
            images = self.resident[index.to(self.device)]
        else:
            images = torch.from_numpy(self.split.images[index.numpy()])
            images = images.pin_memory() if self.device.type == "cuda" else images
            images = images.to(self.device, non_blocking=True)
        images = images.permute(0, 3, 1, 2).float()
        boxes = self._boxes(self.sizes[index])
        if boxes is not None:
            images = crop(images, boxes.to(self.device), self.image_size, self.interpolation)
        elif images.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            images = F.interpolate(images, size, mode=self.interpolation, antialias=True).clamp(0, 255)
        return (images - self.mean) / self.std

    def _boxes(self, sizes: Tensor) -> Tensor | None:
        """The part of each image to show; None for all of it."""
        train = self.generator is not None
        if train and self.scale < 1:
            boxes = random_resized_boxes(sizes, self.scale, self.generator)
        else:
            boxes = centre_boxes(sizes, self.centre)
            if not (train and self.flip) and torch.equal(boxes, torch.tensor([0.0, 0, 1, 1]).expand_as(boxes)):
                return None
        if train and self.flip:
            flipped = torch.rand(len(boxes), generator=self.generator) < 0.5
            boxes[flipped] = boxes[flipped][:, [2, 1, 0, 3]]
        return boxes


def random_resized_boxes(sizes: Tensor, smallest: float, generator, ratio=(3 / 4, 4 / 3), tries=10) -> Tensor:
    """Crop boxes drawn as torchvision's RandomResizedCrop draws them.

    Args:
        sizes: [B, 2], width and height of the original images in pixels.
        smallest: smallest share of the area; the largest is 1.

    Returns:
        [B, 4]: left, top, right, bottom as shares of width and height.

    Area is uniform, aspect ratio log-uniform; the first of ten draws that fits is taken, otherwise the largest centre
    crop whose aspect ratio is allowed. Sides and corners are whole pixels of the original image.
    """
    width, height = sizes[:, :1], sizes[:, 1:]
    uniform = torch.rand(4, len(sizes), tries, generator=generator)
    area = width * height * (smallest + (1 - smallest) * uniform[0])
    low, high = np.log(ratio[0]), np.log(ratio[1])
    aspect = torch.exp(low + (high - low) * uniform[1])
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.float().argmax(1, keepdim=True)
    w, h, u_left, u_top = (t.gather(1, first)[:, 0] for t in (w, h, uniform[2], uniform[3]))
    width, height = width[:, 0], height[:, 0]
    left, top = (u_left * (width - w + 1)).floor(), (u_top * (height - h + 1)).floor()
    centre_w = torch.minimum(width, (height * ratio[1]).round())
    centre_h = torch.minimum(height, (width / ratio[0]).round())
    none = ~fits.any(1)
    w, h = torch.where(none, centre_w, w), torch.where(none, centre_h, h)
    left = torch.where(none, ((width - w) / 2).floor(), left)
    top = torch.where(none, ((height - h) / 2).floor(), top)
    return torch.stack([left / width, top / height, (left + w) / width, (top + h) / height], 1)


def centre_boxes(sizes: Tensor, share: float) -> Tensor:
    """[B, 4]: the centred square whose side is ``share`` of the shorter side, as shares of width and height."""
    half = sizes.amin(1, keepdim=True) * share / sizes / 2
    return torch.cat([0.5 - half, 0.5 + half], 1)


def crop(images: Tensor, boxes: Tensor, size: int, interpolation="bilinear") -> Tensor:
    """Cuts a box out of each image and resizes it, in one batched call.

    images [B, C, H, W] in [0, 255], boxes [B, 4] (left, top, right, bottom as shares of the side; left and right
    exchanged = flipped) -> [B, C, size, size].
    """
    left, top, right, bottom = boxes.unbind(1)
    zero = torch.zeros_like(left)
    theta = torch.stack(
        [
            torch.stack([right - left, zero, right + left - 1], 1),
            torch.stack([zero, bottom - top, bottom + top - 1], 1),
        ],
        1,
    )  # [B, 2, 3]: from output coordinates in [-1, 1] to input coordinates in [-1, 1]
    grid = F.affine_grid(theta, [len(images), images.shape[1], size, size], align_corners=False)
    cropped = F.grid_sample(images, grid, mode=interpolation, padding_mode="border", align_corners=False)
    return cropped.clamp(0, 255)  # bicubic overshoots


class TransformBatches:
    """timm's own training transform, image by image in worker processes: RandAugment and colour jitter need it."""

    def __init__(self, split, packed, settings, device, generator):
        self.split, self.device = split, device
        transform = create_transform(
            settings.image_size,
            is_training=True,
            scale=(settings.crop_scale, 1.0),
            hflip=0.5 * settings.flip,
            color_jitter=settings.color_jitter or None,
            auto_augment=settings.auto_augment or None,
            interpolation=settings.interpolation,
            mean=packed.mean,
            std=packed.std,
        )
        count = len(split.images)
        self.loader = DataLoader(
            _Transformed(split, transform),
            min(settings.batch_size, count),
            shuffle=True,
            generator=generator,
            num_workers=os.cpu_count(),
            persistent_workers=True,
            drop_last=True,
            pin_memory=device.type == "cuda",
        )

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for images, labels in self.loader:
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


class _Transformed(Dataset):
    def __init__(self, split: Split, transform):
        self.split, self.transform = split, transform

    def __len__(self):
        return len(self.split.images)

    def __getitem__(self, i):
        image = Image.fromarray(self.split.images[i].squeeze())  # timm's transforms take grey, RGB or RGBA pictures
        width, height = self.split.sizes[i]
        if width != height:  # back from the stored square to the original aspect ratio
            scale = image.width / min(width, height)
            image = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
        return self.transform(image), int(self.split.labels[i])
