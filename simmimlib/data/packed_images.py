"""Crops of packed arrays, a whole batch at once on the device: SimMIM's pre-training needs nothing else of an input."""

import mmap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from simmimlib.data.crops import centre_boxes, crop, flip, random_resized_boxes, resize
from simmimlib.data.packed import Packed, Split
from simmimlib.data.streams import CROPS, random_stream
from simmimlib.machine.distributed import local_shard

READERS = 8  # threads that copy rows of the memory map: on a cold page cache they wait for the disk


def normaliser(packed: Packed, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation as [1, C, 1, 1] tensors, for pixels in [0, 255]."""
    mean, std = (torch.tensor(v, device=device).view(1, -1, 1, 1) * 255 for v in (packed.mean, packed.std))
    return mean, std


def to_pixels(images: Tensor, packed: Packed) -> Tensor:
    """Normalised [B, C, H, W] back to [0, 1] pixels [B, H, W, C], for showing."""
    mean, std = normaliser(packed, images.device)
    return ((images.float() * std + mean) / 255).clamp(0, 1).permute(0, 2, 3, 1)


class PackedImages:
    """Crops of a packed split, a whole batch at once on the device.

    On a GPU, a set that fits into half of the free memory is kept there as uint8. A larger one is read through the
    memory map into pinned memory, one step ahead; memory does not grow with the set.

    Args:
        image_size: side of the images handed out.
        seed: draws crops and flips (on the CPU, so they are the same on every device); None takes the centre crop.
        scale: smallest share of the image's area that a random crop keeps; 1 turns cropping off.
        flip: flip half of the images horizontally.
        crop_pct: side of the centre crop as a share of the shorter side (0.875 = 224 of 256).
        interpolation: ``"bilinear"`` or ``"bicubic"``.
    """

    def __init__(
        self,
        split: Split,
        packed: Packed,
        image_size: int,
        device: torch.device,
        seed: int | None = None,
        scale: float = 1.0,
        flip: bool = False,
        crop_pct: float = 1.0,
        interpolation: str = "bilinear",
    ):
        self.split, self.image_size, self.device, self.seed = split, image_size, device, seed
        self.scale, self.flip, self.crop_pct, self.interpolation = scale, flip, crop_pct, interpolation
        self.mean, self.std = normaliser(packed, device)
        self.sizes = torch.from_numpy(np.array(split.sizes)).float()
        # decided for the whole split: how an image is resized must not depend on its neighbours in a batch
        self.square = bool((self.sizes[:, 0] == self.sizes[:, 1]).all())
        self.resident = None
        self.ahead = device.type == "cuda"  # reading can overlap with computing there
        if self.ahead and split.images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
            self.resident = torch.from_numpy(np.array(split.images)).to(device)

    def __call__(self, epoch: int, steps: list) -> Iterator[Tensor]:
        shards = [local_shard(rows) for _, rows in steps]
        if self.resident is not None:
            arrays = (self.resident[rows.to(self.device, non_blocking=True)] for rows in shards)
        else:
            arrays = (array.to(self.device, non_blocking=True) for array in self._stream(shards))
        for (step, rows), array in zip(steps, arrays, strict=True):
            yield self._cut(array.permute(0, 3, 1, 2).float(), self._boxes(epoch, step, rows))

    def _stream(self, shards: list[Tensor]) -> Iterator[Tensor]:
        """Rows of the memory map, each shard read while the one before it is used where that can overlap."""
        if not self.ahead:
            yield from map(self._rows, shards)
            return
        with ThreadPoolExecutor(READERS) as readers, ThreadPoolExecutor(1) as ahead:
            waiting = [ahead.submit(self._rows, rows, readers) for rows in shards[:1]]
            for rows in [*shards[1:], None]:
                if rows is not None:
                    waiting.append(ahead.submit(self._rows, rows, readers))
                yield waiting.pop(0).result()

    def _rows(self, rows: Tensor, readers: ThreadPoolExecutor | None = None) -> Tensor:
        """uint8 [B, size, size, C]."""
        source, pinned = self.split.images, self.device.type == "cuda"
        images = torch.empty((len(rows), *source.shape[1:]), dtype=torch.uint8, pin_memory=pinned)

        def copy(start: int, stop: int) -> None:
            np.take(source, rows[start:stop].numpy(), axis=0, out=images[start:stop].numpy(), mode="clip")

        cuts = np.linspace(0, len(rows), READERS + 1 if readers else 2).astype(int)
        list((readers.map if readers else map)(copy, cuts[:-1], cuts[1:]))
        if isinstance(source.base, mmap.mmap):  # the pages stay in the system's cache, but no longer count as ours
            source.base.madvise(mmap.MADV_DONTNEED)
        return images

    def _cut(self, images: Tensor, boxes: Tensor | None) -> Tensor:
        if boxes is not None:
            images = crop(images, boxes.to(self.device, non_blocking=True), self.image_size, self.interpolation)
        elif images.shape[-1] != self.image_size:
            images = resize(images, self.image_size, self.interpolation)
        return images.sub_(self.mean).div_(self.std)

    def _boxes(self, epoch: int, step: int, rows: Tensor) -> Tensor | None:
        """The part of each image to show; None for all of it. Drawn for the global batch, then shared."""
        sizes, boxes = self.sizes[rows], None
        stream = random_stream(self.seed, CROPS, epoch, step) if self.seed is not None else None
        if stream and self.scale < 1:
            boxes = random_resized_boxes(sizes, self.scale, stream)
        elif self.crop_pct < 1 or not self.square:
            boxes = centre_boxes(sizes, self.crop_pct)
        if stream and self.flip:
            boxes = torch.tensor([[0.0, 0, 1, 1]]).repeat(len(rows), 1) if boxes is None else boxes
            boxes = flip(boxes, torch.rand(len(boxes), generator=stream) < 0.5)
        return None if boxes is None else local_shard(boxes)
