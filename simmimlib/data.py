"""Packed data sets (paper section 4): the uint8 arrays that ``packing.py`` writes, and how they are read.

A packed data set is a folder: ``train_images.npy`` [N, size, size, C] uint8, ``train_labels.npy`` [N] int64 (-1 = no
label), ``train_sizes.npy`` [N, 2] int32, original width and height, ``train_files.npy`` [N] bytes of fixed width, the
file each image came from in UTF-8 (empty where it came from an array); the same for ``val``; ``manifest.json``; and
``unreadable.txt``, the files left out and why. All arrays are memory-mapped when read. Images are stored squashed to a
square; crops are drawn in the original geometry, so that the aspect ratio comes out right.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from simmimlib.packing import pack
from simmimlib.settings import require
from simmimlib.sources import DataSettings

PARTS = ("images", "labels", "sizes", "files")


class Split(NamedTuple):
    images: np.ndarray  # [N, size, size, C] uint8, memory-mapped
    labels: np.ndarray  # [N], -1 = no label
    sizes: np.ndarray  # [N, 2], original width and height
    files: np.ndarray  # [N] bytes, UTF-8; empty where the image came from an array

    def __len__(self):
        raise TypeError("use len(split.images)")  # a tuple's own length would always be 4

    def select(self, indices) -> "Split":
        return Split(*(array[indices] for array in self))


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
        ValueError: there is no such packed folder, or one of an earlier version; the message says how to make one.
    """
    folder = Path(data)
    if data == "mnist5k":
        folder = Path(DataSettings().out)
        if not (folder / "train_files.npy").is_file():
            pack(DataSettings())
    if not (folder / "manifest.json").is_file():
        raise ValueError(
            f"data = {data!r}: there is no packed data set (no manifest.json in that folder). Make one with "
            "notebooks/01_data.ipynb, for example: papermill notebooks/01_data.ipynb /tmp/01_data.ipynb "
            f"-p data folder -p path /my/images -p out {data if '/' in data else 'data/packed/' + data}"
        )
    for name in ("train_files.npy", "val_files.npy"):
        if not (folder / name).is_file():
            raise ValueError(
                f"data = {data!r}: this folder was packed by an earlier version (it has no {name}); pack it again, "
                "with notebooks/01_data.ipynb"
            )
    manifest = json.loads((folder / "manifest.json").read_text())
    splits = [
        Split(*(np.load(folder / f"{split}_{part}.npy", mmap_mode="r") for part in PARTS)) for split in ("train", "val")
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
