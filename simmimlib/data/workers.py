"""Images that worker processes make one by one with timm's transforms.

Decoded anew from the files that were packed (the faithful path), or taken from the packed arrays: RandAugment and
colour jitter work on single pictures.
"""

import os
from collections.abc import Callable, Iterator

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from simmimlib.data.packed import Packed, Split
from simmimlib.data.sources import MODES, read_image
from simmimlib.data.streams import WORKERS, seed_globals
from simmimlib.machine.device import cores
from simmimlib.machine.distributed import local_shard
from simmimlib.settings import require


class TransformedImages:
    """A source of ``Batches``.

    Args:
        transform: from a Pillow image to a normalised tensor.
        files: decode the files anew in each epoch; otherwise take the packed arrays.

    Raises:
        ValueError: a number of channels that Pillow has no image of, or a set that was packed from arrays.
    """

    def __init__(
        self,
        split: Split,
        packed: Packed,
        device: torch.device,
        transform: Callable,
        files: bool,
        seed: int = 0,
    ):
        require(packed.channels in MODES, "channels", packed.channels, "1, 3 or 4 for timm's transforms")
        if files and not all(split.files[:1]):
            raise ValueError(f"source = 'files': {packed.name} was packed from arrays; use source = 'packed'")
        self.device, self.seed, self.channels = device, seed, packed.channels
        self.steps: list = []  # of lists of (stream, row): what the loader reads next
        self.loader = DataLoader(
            _Transformed(split, transform, packed.channels if files else None),
            batch_sampler=self.steps,
            num_workers=cores(),
            persistent_workers=True,
            pin_memory=device.type == "cuda",
        )

    def __call__(self, epoch: int, steps: list) -> Iterator[Tensor]:
        shards = (local_shard(rows).tolist() for _, rows in steps)
        keys = [[(self.seed, WORKERS, epoch, row) for row in rows] for rows in shards]
        self.steps[:] = [of_step for of_step in keys if of_step]
        loaded = iter(self.loader)
        for of_step in keys:
            # of several processes one may have no share of the last batch, or of the only one: images of no size
            images = next(loaded) if of_step else torch.zeros(0, self.channels, 1, 1)
            yield images.to(self.device, non_blocking=True)


class _Transformed(Dataset):
    def __init__(self, split: Split, transform: Callable, channels: int | None):
        self.split, self.transform, self.channels = split, transform, channels

    def __getitem__(self, key: tuple[int, ...]) -> Tensor:
        # timm's transforms draw from all three generators; in the worker nobody else uses them
        seed_globals(torch.device("cpu"), *key)
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
