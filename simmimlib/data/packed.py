"""Packed data sets (paper section 4): the format of the uint8 arrays that ``packing.py`` writes, and how they are read.

A packed data set is a folder: ``train_images.npy`` [N, size, size, C] uint8, ``train_labels.npy`` [N] int64 (-1 = no
label), ``train_sizes.npy`` [N, 2] int32, original width and height, ``train_files.npy`` [N] bytes of fixed width, the
file each image came from in UTF-8 (empty where it came from an array); the same for ``val``; ``manifest.json``; and
``unreadable.txt``, the files left out and why. All arrays are memory-mapped when read. Images are stored squashed to a
square; crops are drawn in the original geometry, so that the aspect ratio comes out right.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from simmimlib.data.packing import pack
from simmimlib.data.sources import DataSettings
from simmimlib.data.streams import LABELLED, random_stream
from simmimlib.machine.files import read_json
from simmimlib.settings import require


@dataclass(frozen=True)
class Split:
    images: np.ndarray  # [N, size, size, C] uint8, memory-mapped
    labels: np.ndarray  # [N], -1 = no label
    sizes: np.ndarray  # [N, 2], original width and height
    files: np.ndarray  # [N] bytes, UTF-8; empty where the image came from an array

    def __len__(self) -> int:
        return len(self.images)

    def select(self, indices: np.ndarray | slice) -> "Split":
        return Split(self.images[indices], self.labels[indices], self.sizes[indices], self.files[indices])


@dataclass
class Packed:
    """A packed data set, opened. ``digest`` follows from the labels and pixels of all its images."""

    name: str
    classes: list[str]
    size: int
    channels: int
    mean: list[float]
    std: list[float]
    digest: str
    train: Split
    val: Split


def open_packed(data: str) -> Packed:
    """Opens a packed folder. ``data`` may also be ``"mnist5k"``, which is packed on first use (no download).

    Raises:
        ValueError: there is no such packed folder, one of an earlier version, or one that lost a file; the message says
            how to make one.
    """
    folder = Path(data)
    if data == "mnist5k":
        folder = Path(DataSettings().out)
        if "digest" not in read_manifest(folder):
            pack(DataSettings(), timeout=600)  # several processes may start at once
    manifest = read_manifest(folder)
    if not manifest:
        raise ValueError(
            f"data = {data!r}: there is no packed data set (no manifest.json in that folder). Make one with "
            "notebooks/01_data.ipynb, for example: papermill notebooks/01_data.ipynb /tmp/01_data.ipynb "
            f"-p data folder -p path /my/images -p out {data if '/' in data else 'data/packed/' + data}"
        )
    if "digest" not in manifest:
        raise ValueError(
            f"data = {data!r}: this folder was packed by an earlier version (its manifest has no digest); pack it "
            "again, with notebooks/01_data.ipynb"
        )
    parts = ("images", "labels", "sizes", "files")
    paths = {split: [folder / f"{split}_{part}.npy" for part in parts] for split in ("train", "val")}
    if lost := [path.name for of_split in paths.values() for path in of_split if not path.is_file()]:
        raise ValueError(f"data = {data!r}: of this packed folder {', '.join(lost)} is missing; pack it again")
    train, val = (Split(*(np.load(path, mmap_mode="r") for path in of_split)) for of_split in paths.values())
    names = ("data", "classes", "size", "channels", "mean", "std", "digest")
    return Packed(*(manifest[name] for name in names), train, val)  # type: ignore[call-arg]


def read_manifest(folder: str | Path) -> dict:
    """What a packed folder says of itself; {} if it is none."""
    return read_json(Path(folder) / "manifest.json")


def labelled_subset(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Indices of ``count`` training images, the same number of each class; the same ones for every run of a seed.

    Raises:
        ValueError: the count is not a multiple of the classes, or a class has too few images.
    """
    name, generator = "labelled_images", random_stream(seed, LABELLED)
    classes = np.unique(labels)
    require(count % len(classes) == 0, name, count, f"0 (all) or a multiple of the {len(classes)} classes")
    each = count // len(classes)
    fewest = np.bincount(labels).min()
    require(each <= fewest, name, count, f"at most {fewest * len(classes)} (the rarest class has {fewest} images)")
    chosen = []
    for label in classes:
        members = np.flatnonzero(labels == label)
        chosen.append(members[torch.randperm(len(members), generator=generator)[:each].numpy()])
    return np.sort(np.concatenate(chosen))
