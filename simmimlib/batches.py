"""Batches for training and validation (paper section 4): cropped, flipped and normalised, on the device.

SimMIM's pre-training needs nothing but a random crop, a flip, a normalisation and a mask, so whole batches are made at
once where the model is, and no worker decodes or augments image by image (``ArrayImages``). The faithful path, which
decodes each file anew in every epoch, and RandAugment do need workers (``TransformedImages``).

Order, crops and masks of a step follow from seed, epoch and step alone, not from what was drawn before. So a run can
go on anywhere, several processes draw the same global batch and take their share of it, and what a worker draws does
not depend on how many there are.
"""

import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from timm.utils import random_seed
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from simmimlib.data import Packed, Split
from simmimlib.runtime import share, world_size
from simmimlib.settings import require
from simmimlib.sources import MODES, read_image

SOURCES = ("packed", "files")
INTERPOLATIONS = ("bilinear", "bicubic")
ORDER, CROPS, MASKS, WORKERS = range(4)  # what random numbers are for: each use has a stream of its own
READERS = 8  # threads that copy rows of the memory map: on a cold page cache they wait for the disk


def random_stream(*key: int) -> torch.Generator:
    """A generator on the CPU whose numbers follow from the key."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


def normaliser(packed: Packed, device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation as [1, C, 1, 1] tensors, for pixels in [0, 255]."""
    mean, std = (torch.tensor(v, device=device).view(1, -1, 1, 1) * 255 for v in (packed.mean, packed.std))
    return mean, std


def to_pixels(images: Tensor, packed: Packed) -> Tensor:
    """Normalised [B, C, H, W] back to [0, 1] pixels [B, H, W, C], for showing."""
    mean, std = normaliser(packed, images.device)
    return ((images.float() * std + mean) / 255).clamp(0, 1).permute(0, 2, 3, 1)


class Batches:
    """Batches of one split on the device.

    Args:
        split: whose labels and order.
        images: the source, one of the classes below: called with an epoch and a list of (step, rows), it yields each
            step's images [B, C, H, W], normalised, on the device; of several processes each gets its share.
        batch_size: images a step, over all processes.
        device: where batches are.
        seed: shuffles, and drops an incomplete last batch; None reads everything in order.
        masks: a ``MaskGenerator``: batches are then (images, masks [B, h, w]), otherwise (images, labels [B]).
    """

    def __init__(self, split: Split, images: Callable, batch_size: int, device, seed=None, masks=None):
        self.images, self.batch_size, self.device, self.seed, self.masks = images, batch_size, device, seed, masks
        self.labels = torch.from_numpy(np.array(split.labels))

    def __len__(self):
        whole, rest = divmod(len(self.labels), self.batch_size)
        return whole if self.seed is not None and whole else whole + bool(rest)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch(0)

    def rows(self, epoch: int) -> list[Tensor]:
        """The rows of the split that each step of an epoch reads."""
        order = torch.arange(len(self.labels))
        if self.seed is not None:
            order = torch.randperm(len(order), generator=random_stream(self.seed, ORDER, epoch))
        return list(order.split(self.batch_size))[: len(self)]

    def epoch(self, epoch: int, first=0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the batches of an epoch from step ``first`` on."""
        steps = list(enumerate(self.rows(epoch)))[first:]
        for (step, rows), images in zip(steps, self.images(epoch, steps), strict=True):
            if self.masks is None:
                yield images, self.labels[share(rows)].to(self.device, non_blocking=True)
            else:
                stream = random_stream(self.seed or 0, MASKS, epoch, step)
                yield images, share(self.masks(len(rows), stream, self.device))


class ArrayImages:
    """Crops of a packed split, a whole batch at once on the device.

    On a GPU, a set that fits into half of the free memory is kept there as uint8. A larger one is read through the
    memory map into pinned memory, one step ahead; memory does not grow with the set.

    Args:
        image_size: side of the images handed out.
        seed: draws crops and flips (on the CPU, so they are the same on every device); None takes the centre crop.
        scale: smallest share of the image's area that a random crop keeps; 1 turns cropping off.
        flip: flip half of the images horizontally.
        centre: side of the centre crop as a share of the shorter side (0.875 = 224 of 256).
        interpolation: ``"bilinear"`` or ``"bicubic"``.
    """

    def __init__(
        self,
        split: Split,
        packed: Packed,
        image_size,
        device,
        seed=None,
        scale=1.0,
        flip=False,
        centre=1.0,
        interpolation="bilinear",
    ):
        self.split, self.image_size, self.device, self.seed = split, image_size, device, seed
        self.scale, self.flip, self.centre, self.interpolation = scale, flip, centre, interpolation
        self.mean, self.std = normaliser(packed, device)
        self.sizes = torch.from_numpy(np.array(split.sizes)).float()
        self.resident = None
        self.ahead = device.type == "cuda"  # reading can overlap with computing there
        if self.ahead and split.images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
            self.resident = torch.from_numpy(np.array(split.images)).to(device)

    def __call__(self, epoch: int, steps: list) -> Iterator[Tensor]:
        parts = [share(rows) for _, rows in steps]
        if self.resident is not None:
            arrays = (self.resident[part.to(self.device, non_blocking=True)] for part in parts)
        else:
            arrays = (array.to(self.device, non_blocking=True) for array in self._stream(parts))
        for (step, rows), array in zip(steps, arrays, strict=True):
            yield self._cut(array.permute(0, 3, 1, 2).float(), self._boxes(epoch, step, rows))

    def _stream(self, parts: list) -> Iterator[Tensor]:
        """Rows of the memory map, each part read while the one before it is used where that can overlap."""
        if not self.ahead:
            yield from map(self._rows, parts)
            return
        with ThreadPoolExecutor(READERS) as readers, ThreadPoolExecutor(1) as ahead:
            waiting = [ahead.submit(self._rows, part, readers) for part in parts[:1]]
            for part in [*parts[1:], None]:
                if part is not None:
                    waiting.append(ahead.submit(self._rows, part, readers))
                yield waiting.pop(0).result()

    def _rows(self, rows: Tensor, readers=None) -> Tensor:
        """uint8 [B, size, size, C]."""
        source, pinned = self.split.images, self.device.type == "cuda"
        images = torch.empty((len(rows), *source.shape[1:]), dtype=torch.uint8, pin_memory=pinned)

        def copy(start, stop):
            np.take(source, rows[start:stop].numpy(), axis=0, out=images[start:stop].numpy(), mode="clip")

        cuts = np.linspace(0, len(rows), READERS + 1).astype(int) if readers else np.array([0, len(rows)])
        list((readers.map if readers else map)(copy, cuts[:-1], cuts[1:]))
        if isinstance(source, np.memmap):  # the pages stay in the system's cache, but no longer count as ours
            source._mmap.madvise(mmap.MADV_DONTNEED)
        return images

    def _cut(self, images: Tensor, boxes: Tensor | None) -> Tensor:
        if boxes is not None:
            images = crop(images, boxes.to(self.device, non_blocking=True), self.image_size, self.interpolation)
        elif images.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            images = F.interpolate(images, size, mode=self.interpolation, antialias=True).clamp(0, 255)
        return images.sub_(self.mean).div_(self.std)

    def _boxes(self, epoch: int, step: int, rows: Tensor) -> Tensor | None:
        """The part of each image to show; None for all of it. Drawn for the global batch, then shared."""
        sizes, boxes = self.sizes[rows], None
        stream = random_stream(self.seed, CROPS, epoch, step) if self.seed is not None else None
        if stream and self.scale < 1:
            boxes = random_resized_boxes(sizes, self.scale, stream)
        elif self.centre < 1 or (sizes[:, 0] != sizes[:, 1]).any():
            boxes = centre_boxes(sizes, self.centre)
        if stream and self.flip:
            boxes = torch.tensor([[0.0, 0, 1, 1]]).repeat(len(rows), 1) if boxes is None else boxes
            flipped = torch.rand(len(boxes), generator=stream) < 0.5
            boxes[flipped] = boxes[flipped][:, [2, 1, 0, 3]]
        return boxes if boxes is None else share(boxes)


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
    return cropped.clamp_(0, 255) if interpolation == "bicubic" else cropped  # which overshoots


class TransformedImages:
    """Images that worker processes make one by one with timm's transforms.

    Decoded anew from the files that were packed (``files``), or taken from the packed arrays: RandAugment and colour
    jitter work on single pictures.
    """

    def __init__(self, split: Split, packed: Packed, device, transform: Callable, files: bool, seed=0):
        require(packed.channels in MODES, "channels", packed.channels, "1, 3 or 4 for timm's transforms")
        if files and not all(split.files[:1]):
            raise ValueError(f"source = 'files': {packed.name} was packed from arrays; use source = 'packed'")
        self.device, self.seed = device, seed
        self.steps = []  # of lists of (stream, row): what the loader reads next
        workers = max(1, os.cpu_count() // world_size())
        self.loader = DataLoader(
            _Transformed(split, transform, packed.channels if files else None),
            batch_sampler=self.steps,
            num_workers=workers,
            persistent_workers=True,
            pin_memory=device.type == "cuda",
        )

    def __call__(self, epoch: int, steps: list) -> Iterator[Tensor]:
        self.steps[:] = [[(self.seed, WORKERS, epoch, row) for row in share(rows).tolist()] for _, rows in steps]
        for images in self.loader:
            yield images.to(self.device, non_blocking=True)


class _Transformed(Dataset):
    def __init__(self, split: Split, transform, channels):
        self.split, self.transform, self.channels = split, transform, channels

    def __getitem__(self, key):
        # timm's transforms draw from all three generators; in the worker nobody else uses them
        random_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
        i = key[-1]
        if self.channels:
            pixels = read_image(os.fsdecode(self.split.files[i]), self.channels)
            return self.transform(Image.fromarray(pixels.squeeze()))
        image = Image.fromarray(self.split.images[i].squeeze())
        width, height = self.split.sizes[i]
        if width != height:  # back from the stored square to the original aspect ratio
            scale = image.width / min(width, height)
            image = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
        return self.transform(image)


def training_batches(settings, split: Split, packed: Packed, device, masks=None) -> Batches:
    """Shuffled and augmented as a loop's settings say."""
    if settings.source == "files" or settings.auto_augment or settings.color_jitter:
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
        images = TransformedImages(split, packed, device, transform, settings.source == "files", settings.seed)
    else:
        images = ArrayImages(
            split,
            packed,
            settings.image_size,
            device,
            settings.seed,
            settings.crop_scale,
            settings.flip,
            interpolation=settings.interpolation,
        )
    return Batches(split, images, min(settings.batch_size, len(split.images)), device, settings.seed, masks)


def validation_batches(
    split: Split,
    packed: Packed,
    image_size,
    batch_size,
    device,
    masks=None,
    centre=1.0,
    interpolation="bilinear",
    files=False,
) -> Batches:
    """Every image once, in order, its centre crop; under ``masks`` that are the same each time."""
    if files:
        transform = create_transform(
            image_size, crop_pct=centre, interpolation=interpolation, mean=packed.mean, std=packed.std
        )
        images = TransformedImages(split, packed, device, transform, files)
    else:
        images = ArrayImages(split, packed, image_size, device, centre=centre, interpolation=interpolation)
    return Batches(split, images, batch_size, device, masks=masks)
