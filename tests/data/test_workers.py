import os

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import write_images
from packed_sets import KINDS, equal, pack_folder, train
from simmimlib.data.batches import validation_batches
from simmimlib.data.packed import open_packed
from simmimlib.data.packing import pack
from simmimlib.data.sources import DataSettings
from simmimlib.data.workers import _Transformed


@pytest.mark.parametrize("kind", ["files", "randaugment"])
def test_the_number_of_workers_changes_nothing(wide, kind, monkeypatch):
    epochs = []
    for count in (1, 2):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        epochs.append(list(train(wide, **KINDS[kind]).epoch(0)))
    assert equal(*epochs)


def test_arrays_have_no_files(tmp_path, white_digits):
    pack(DataSettings(out=str(tmp_path / "digits")))
    digits = open_packed(str(tmp_path / "digits"))
    with pytest.raises(ValueError, match="source = 'files': mnist5k was packed from arrays; use source = 'packed'"):
        train(digits, source="files")


def test_pictures_from_arrays_have_their_original_shape(tmp_path):
    """What timm's transforms are given: the stored square, back to 60 : 40."""
    rows, columns = np.mgrid[0:40, 0:60]
    original = Image.fromarray(np.stack([columns * 4, rows * 6, columns + rows], 2).astype(np.uint8))
    (tmp_path / "images").mkdir()
    original.save(tmp_path / "images/0.png")
    pack_folder(tmp_path, tmp_path / "images", size=24)
    seen = []
    split = open_packed(str(tmp_path / "out")).train
    _Transformed(split, lambda picture: seen.append(picture), None)[(0, 0, 0, 0)]
    assert seen[0].size == (36, 24), "the shorter side is as long as the stored ones"
    expected = np.asarray(original.resize((36, 24), Image.Resampling.BICUBIC)).astype(float)
    assert np.abs(np.asarray(seen[0]) - expected).mean() < 2


def test_a_picture_follows_from_seed_epoch_and_row(wide):
    def pictures(**changes):
        return train(wide, **KINDS["files"], **changes).images

    steps = [(0, torch.tensor([5, 2])), (1, torch.tensor([5]))]
    (first, second), (other,), (anew,) = (
        list(pictures()(0, steps)),
        list(pictures()(1, steps[1:])),
        list(pictures(seed=1)(0, steps[1:])),
    )
    assert torch.equal(first[:1], second), "whatever the step and the neighbours"
    assert not torch.equal(second, other) and not torch.equal(second, anew)


def test_images_of_twelve_channels_have_no_transforms(tmp_path):
    (tmp_path / "arrays").mkdir()
    for i in range(8):
        np.save(tmp_path / f"arrays/{i}.npy", np.zeros((16, 16, 12), np.uint8))
    pack_folder(tmp_path, tmp_path / "arrays", size=16, channels=12)
    with pytest.raises(ValueError, match="channels = 12: must be 1, 3 or 4 for timm's transforms"):
        train(open_packed(str(tmp_path / "out")), source="files")


def test_randaugment_has_no_images_of_four_channels(tmp_path):
    """Pillow's operations refuse them, one only when it is drawn."""
    pack_folder(tmp_path, write_images(tmp_path / "clear", mode="RGBA"), size=16, channels=4)
    packed = open_packed(str(tmp_path / "out"))
    with pytest.raises(ValueError, match="auto_augment = 'rand-m9': must be empty for images of 4 channels"):
        train(packed, auto_augment="rand-m9")
    assert next(iter(train(packed, source="files")))[0].shape[1] == 4


def test_grey_files_and_arrays_stay_grey(tmp_path):
    pack_folder(tmp_path, write_images(tmp_path / "grey", mode="L"), size=16, channels=1)
    packed = open_packed(str(tmp_path / "out"))
    for changes in KINDS.values():
        images, _ = next(iter(train(packed, **changes)))
        assert images.shape == (6, 1, 16, 16)


@pytest.mark.parametrize("kind", ["files", "packed"])
def test_a_process_without_a_share_gets_no_images(wide, kind, monkeypatch):
    """Sixteen images in batches of five: of the last one the second process has none."""
    for module in ("workers", "packed_images", "batches"):
        monkeypatch.setattr(
            f"simmimlib.data.{module}.local_shard", lambda tensor: tensor.tensor_split(2)[1] if len(tensor) else tensor
        )
    files = {"files": kind == "files", "crop_pct": 0.9}
    counts = [
        (len(images), len(labels))
        for images, labels in validation_batches(wide.val, wide, 16, 5, torch.device("cpu"), **files)
    ]
    assert counts == [(2, 2), (2, 2), (2, 2), (0, 0)]
