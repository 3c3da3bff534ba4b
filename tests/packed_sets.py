"""Packed data sets for tests, and batches of them on the CPU."""

from types import SimpleNamespace

import torch

from simmimlib.data.batches import Batches, training_batches
from simmimlib.data.packed_images import PackedImages
from simmimlib.data.packing import pack
from simmimlib.data.sources import DataSettings

CPU = torch.device("cpu")
KINDS = {  # of training batches: changes to `loop_settings`
    "packed": {},
    "files": {"source": "files"},
    "randaugment": {"auto_augment": "rand-m9-mstd0.5-inc1", "interpolation": "bicubic"},
}


def pack_folder(tmp_path, path, **changes):
    """Packs an image folder into ``tmp_path / "out"``; returns the manifest."""
    settings = DataSettings(
        **{"data": "folder", "path": str(path), "channels": 3, "out": str(tmp_path / "out")} | changes
    )
    return pack(settings)


def batches(split, packed, image_size, batch_size, seed=None, **crops):
    return Batches(split, PackedImages(split, packed, image_size, CPU, seed, **crops), batch_size, CPU, seed)


def loop_settings(**changes):
    """What ``training_batches`` reads of a loop's settings."""
    values = {"image_size": 16, "batch_size": 6, "seed": 0, "crop_scale": 0.3, "flip": True, "source": "packed"}
    return SimpleNamespace(**values | {"auto_augment": "", "color_jitter": 0.0, "interpolation": "bilinear"} | changes)


def train(packed, masks=None, **changes):
    return training_batches(loop_settings(**changes), packed.train, packed, CPU, masks)


def equal(a, b):
    pairs = zip(a, b, strict=True)
    return all(torch.equal(x, y) for one, two in pairs for x, y in zip(one, two, strict=True))
