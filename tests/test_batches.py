"""Batches do not depend on how they are made: by how many processes and workers, from the start or from the middle."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import write_images
from simmimlib.batches import training_batches, validation_batches
from simmimlib.data import Split, open_packed
from simmimlib.masking import MaskGenerator
from simmimlib.packing import pack
from simmimlib.sources import DataSettings

CPU = torch.device("cpu")
KINDS = {
    "packed": {},
    "files": {"source": "files"},
    "randaugment": {"auto_augment": "rand-m9-mstd0.5-inc1", "interpolation": "bicubic"},
}


def settings(**changes):
    values = {"image_size": 16, "batch_size": 6, "seed": 0, "crop_scale": 0.3, "flip": True, "source": "packed"}
    return SimpleNamespace(**values | {"auto_augment": "", "color_jitter": 0.0, "interpolation": "bilinear"} | changes)


@pytest.fixture
def packed(tmp_path):
    """16 + 16 images, wider than high, so that every kind of crop has something to get wrong."""
    root = write_images(tmp_path / "wide", size=(28, 20))
    pack(DataSettings(data="folder", path=str(root), size=24, channels=3, out=str(tmp_path / "packed24")))
    return open_packed(str(tmp_path / "packed24"))


def batches(packed, masks=None, **changes):
    return training_batches(settings(**changes), packed.train, packed, CPU, masks)


def equal(a, b):
    pairs = zip(a, b, strict=True)
    return all(torch.equal(x, y) for one, two in pairs for x, y in zip(one, two, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_can_be_entered_anywhere(packed, kind):
    masks = MaskGenerator(16, 8, 4, 0.5)
    whole = list(batches(packed, masks, **KINDS[kind]).epoch(3))
    assert len(whole) == 2 and whole[0][0].shape == (6, 3, 16, 16) and whole[0][1].shape == (6, 4, 4)
    again = batches(packed, masks, **KINDS[kind])
    assert equal(list(again.epoch(3, first=1)), whole[1:])
    assert equal(list(again.epoch(3)), whole) and not equal(list(again.epoch(4)), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_processes_share_the_batch_of_one(packed, kind, monkeypatch):
    masks = MaskGenerator(16, 8, 4, 0.5)
    whole = list(batches(packed, masks, **KINDS[kind]).epoch(1))
    parts = []
    monkeypatch.setattr("simmimlib.runtime.world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr("simmimlib.runtime.rank", lambda rank=rank: rank)
        parts.append(list(batches(packed, masks, **KINDS[kind]).epoch(1)))
    joined = [tuple(map(torch.cat, zip(*step, strict=True))) for step in zip(*parts, strict=True)]
    assert equal(joined, whole)


@pytest.mark.parametrize("kind", ["files", "randaugment"])
def test_the_number_of_workers_changes_nothing(packed, kind, monkeypatch):
    epochs = []
    for count in (1, 2):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        epochs.append(list(batches(packed, **KINDS[kind]).epoch(0)))
    assert equal(*epochs)


@pytest.mark.parametrize("files", [False, True])
def test_validation_reads_everything_in_order(packed, files):
    given = list(validation_batches(packed.val, packed, 16, 5, CPU, files=files))
    assert [len(labels) for _, labels in given] == [5, 5, 5, 1]
    assert torch.cat([labels for _, labels in given]).tolist() == [0] * 8 + [1] * 8
    brightness = torch.cat([images.mean((1, 2, 3)) for images, _ in given])
    assert brightness[:8].max() < brightness[8:].min()


def test_both_sources_show_the_same_picture(tmp_path):
    """A smooth picture, stored squashed and cropped from the array, against decoding the file and cropping that."""
    rows, columns = np.mgrid[0:60, 0:90]
    pixels = np.stack([columns * 2, rows * 4, columns + rows], 2).astype(np.uint8)
    (tmp_path / "a/x").mkdir(parents=True)
    for name in "pq":
        Image.fromarray(pixels).save(tmp_path / f"a/x/{name}.png")
    pack(DataSettings(data="folder", path=str(tmp_path / "a"), size=64, channels=3, out=str(tmp_path / "out")))
    packed = open_packed(str(tmp_path / "out"))
    one, two = (next(iter(validation_batches(packed.train, packed, 32, 2, CPU, files=f)))[0] for f in (False, True))
    deviation = torch.tensor(packed.std).view(1, 3, 1, 1) * 255
    assert ((one - two) * deviation).abs().mean() < 2, "mean difference, of 255"


def test_arrays_have_no_files(tmp_path):
    pack(DataSettings(out=str(tmp_path / "digits")))
    digits = open_packed(str(tmp_path / "digits"))
    with pytest.raises(ValueError, match="source = 'files': mnist5k was packed from arrays; use source = 'packed'"):
        batches(digits, source="files")


def test_reading_ahead_gives_the_same_batches(packed):
    """What a GPU run does with a set that does not fit there; threads fill the next batch."""
    plain, ahead = batches(packed), batches(packed)
    ahead.images.ahead = True
    assert equal(list(ahead.epoch(0)), list(plain.epoch(0)))


def mapped_kilobytes(name: str) -> int:
    """Resident pages of the mappings of a file, as the system counts them for this process."""
    total, inside = 0, False
    for line in open("/proc/self/smaps"):  # noqa: SIM115, PTH123
        if "-" in line.split()[0] and ":" not in line.split()[0]:
            inside = name in line
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


def test_memory_does_not_grow_with_the_set(packed, tmp_path):
    big = np.lib.format.open_memmap(tmp_path / "big_images.npy", "w+", np.uint8, (4000, 32, 32, 3))
    big[:] = 1
    big.flush()
    del big
    images = np.load(tmp_path / "big_images.npy", mmap_mode="r")
    zeros = np.zeros(4000, int)
    split = Split(images, zeros, np.full((4000, 2), 32), zeros)
    read = training_batches(settings(batch_size=100, crop_scale=1.0, image_size=32), split, packed, CPU)
    for _ in read.epoch(0):
        assert mapped_kilobytes("big_images") < 4000, "of 12,000"
