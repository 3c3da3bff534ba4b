import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import write_images
from packed_sets import batches, pack_folder
from simmimlib.data import packed as packed_module
from simmimlib.data.packed import labelled_subset, open_packed
from simmimlib.data.packed_images import to_pixels
from simmimlib.data.packing import pack
from simmimlib.data.sources import DataSettings


def test_mnist5k(tmp_path):
    manifest = pack(DataSettings(out=str(tmp_path / "mnist")))
    packed = open_packed(str(tmp_path / "mnist"))
    assert (manifest["train"], manifest["val"], len(manifest["classes"])) == (4000, 1000, 10)
    assert packed.train.images.shape == (4000, 32, 32, 1) and packed.train.images.dtype == np.uint8
    assert (np.bincount(packed.train.labels) == 400).all() and (np.bincount(packed.val.labels) == 100).all()
    assert not packed.train.images[:, :2].any(), "28 pixels are padded to 32"
    assert packed.train.files.dtype == "S1" and not packed.train.files.any(), "they come from an array"
    images, _ = next(iter(batches(packed.train, packed, 32, 4000, seed=0)))
    assert abs(images.mean()) < 1e-3 and abs(images.std() - 1) < 1e-3


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 4)])
def test_folder_keeps_pixels(tmp_path, mode, channels):
    root = write_images(tmp_path / "images", mode=mode)
    pack_folder(tmp_path, root, size=16, channels=channels)
    packed = open_packed(str(tmp_path / "out"))
    assert packed.classes == ["dark", "light"] and packed.train.labels.tolist() == [0] * 8 + [1] * 8
    original = np.asarray(Image.open(root / "train/light/3.png")).reshape(16, 16, channels)
    np.testing.assert_array_equal(packed.train.images[11], original)
    images, _ = next(iter(batches(packed.train, packed, 16, 16)))
    np.testing.assert_allclose(to_pixels(images, packed)[11] * 255, original, atol=1e-3)


def test_packed_images_know_their_files(tmp_path, image_folder):
    pack_folder(tmp_path, image_folder, size=16, train_per_class=3)
    train = open_packed(str(tmp_path / "out")).train
    assert train.files.dtype.kind == "S" and isinstance(train.files, np.memmap)
    assert len(set(train.files.tolist())) == 6
    for i, name in enumerate(train.files):
        np.testing.assert_array_equal(np.asarray(Image.open(name.decode())), train.images[i])
    some = train.select([1, 4])
    assert [some.files[1], *some.labels] == [train.files[4], 0, 1] and some.sizes.tolist() == [[16, 16]] * 2


def test_folders_of_earlier_versions_are_refused(packed_folder):
    manifest = Path(packed_folder, "manifest.json")
    values = json.loads(manifest.read_text())
    assert open_packed(packed_folder).digest == values.pop("digest")
    manifest.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"packed by an earlier version \(its manifest has no digest\); pack it again"):
        open_packed(packed_folder)


def test_labelled_subset():
    labels = np.repeat(np.arange(10), 50)
    chosen = labelled_subset(labels, 100, seed=0)
    assert len(set(chosen.tolist())) == 100 and (np.bincount(labels[chosen]) == 10).all()
    assert np.array_equal(chosen, labelled_subset(labels, 100, seed=0)) and (np.diff(chosen) > 0).all()
    assert not np.array_equal(chosen, labelled_subset(labels, 100, seed=1))
    with pytest.raises(ValueError, match=r"labelled_images = 15: must be 0 \(all\) or a multiple of the 10 classes"):
        labelled_subset(labels, 15, seed=0)
    with pytest.raises(ValueError, match="labelled_images = 510: must be at most 500"):
        labelled_subset(labels, 510, seed=0)


def test_the_digits_are_packed_on_first_use_and_again_when_old(tmp_path, monkeypatch, white_digits):
    calls = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        packed_module, "pack", lambda settings, **more: calls.append(settings.out) or pack(settings, **more)
    )
    digits = open_packed("mnist5k")
    assert (digits.name, digits.channels, len(digits.train), len(digits.val)) == ("mnist5k", 1, 4000, 1000)
    open_packed("mnist5k")
    assert calls == ["data/packed/mnist5k"]
    manifest = tmp_path / "data/packed/mnist5k/manifest.json"
    manifest.write_text(manifest.read_text().replace('"digest"', '"old"'))
    assert open_packed("mnist5k").digest == digits.digest and len(calls) == 2


def test_an_unknown_set_is_told_how_to_be_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for data, out in (("cifar10", "data/packed/cifar10"), ("my/set", "my/set")):
        with pytest.raises(ValueError, match=rf"^data = '{data}': there is no packed data set.* -p out {out}$"):
            open_packed(data)


def test_the_rarest_class_limits_a_labelled_subset():
    labels = np.array([0] * 5 + [1] * 3 + [2] * 4)
    assert (np.bincount(labels[labelled_subset(labels, 9, seed=0)]) == 3).all()
    with pytest.raises(ValueError, match=r"labelled_images = 12: must be at most 9 \(the rarest class has 3 images\)"):
        labelled_subset(labels, 12, seed=0)


def test_a_packed_folder_that_lost_a_file_is_named(packed_folder):
    (Path(packed_folder) / "val_files.npy").unlink()
    with pytest.raises(ValueError, match=r"of this packed folder val_files.npy is missing; pack it again"):
        open_packed(packed_folder)
