import os
from pathlib import Path

# read when torch is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: more threads only wait for each other
os.environ.setdefault("SIMMIM_DEVICE", "cpu")

import numpy as np
import pytest
import torch
from PIL import Image

from simmimlib.data.packing import pack
from simmimlib.data.sources import DataSettings

ROOT = Path(__file__).parents[1]
TINY = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}  # changes to vit_tiny_patch16_224


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def write_images(root: Path, splits=("train", "val"), classes=("dark", "light"), count=8, size=(16, 16), mode="RGB"):
    """Noise images as an image folder; the classes differ in brightness, so that a tiny model can tell them apart."""
    rng = np.random.default_rng(0)
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    for split in splits:
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 100, (size[1], size[0], *channels)) + 140 * label
                Image.fromarray(pixels.astype(np.uint8), mode).save(folder / f"{i}.png")
    return root


@pytest.fixture
def image_folder(tmp_path):
    return write_images(tmp_path / "images")


@pytest.fixture
def packed_folder(tmp_path, image_folder):
    """A packed data set of 16 + 16 RGB images of 16 pixels, two classes."""
    out = tmp_path / "packed"
    pack(DataSettings(data="folder", path=str(image_folder), size=16, channels=3, out=str(out)))
    return str(out)
