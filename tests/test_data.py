import json
import multiprocessing
import os
import shutil
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from conftest import write_images
from simmimlib import packing
from simmimlib.batches import ArrayImages, Batches, centre_boxes, crop, random_resized_boxes, to_pixels
from simmimlib.data import labelled_subset, open_packed
from simmimlib.packing import pack
from simmimlib.sources import DataSettings

CPU = torch.device("cpu")


def pack_folder(tmp_path, path, **changes):
    settings = DataSettings(
        **{"data": "folder", "path": str(path), "channels": 3, "out": str(tmp_path / "out")} | changes
    )
    return pack(settings)


def batches(split, packed, image_size, batch_size, seed=None, **crops):
    return Batches(split, ArrayImages(split, packed, image_size, CPU, seed, **crops), batch_size, CPU, seed)


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


def test_test_folder_serves_as_validation(tmp_path):
    pack_folder(tmp_path, write_images(tmp_path / "images", splits=("train", "test")), size=16)
    assert len(open_packed(str(tmp_path / "out")).val.images) == 16


def test_images_without_classes(tmp_path):
    write_images(tmp_path / "images", splits=(".",), classes=(".",))
    assert pack_folder(tmp_path, tmp_path / "images", size=16)["train"] == 8
    assert (open_packed(str(tmp_path / "out")).train.labels == -1).all()


def test_class_folders_without_train(tmp_path):
    manifest = pack_folder(tmp_path, write_images(tmp_path / "images", splits=(".",)), size=16)
    assert manifest["classes"] == ["dark", "light"] and manifest["val"] == 0


def test_limits_take_the_same_images_again(tmp_path, image_folder):
    first = pack_folder(tmp_path, image_folder, size=16, train_per_class=3, val_per_class=2)
    images = np.array(open_packed(str(tmp_path / "out")).train.images)
    assert (first["train"], first["val"]) == (6, 4)
    pack_folder(tmp_path, image_folder, size=16, train_per_class=3, val_per_class=2)
    np.testing.assert_array_equal(open_packed(str(tmp_path / "out")).train.images, images)


def break_three_files(image_folder):
    """One that is an image no more, and two that never were; returns their names as messages give them."""
    (image_folder / "train/dark/broken.jpg").write_bytes(b"no image")
    (image_folder / "val/light/notes.txt").write_text("no image either")
    cut = (image_folder / "train/light/0.png").read_bytes()[:200]
    (image_folder / "train/light/0.png").write_bytes(cut)
    return [str(image_folder / name) for name in ("train/dark/broken.jpg", "train/light/0.png", "val/light/notes.txt")]


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture
def decoded(monkeypatch):
    """The files that were decoded, in chunks of 4, in the order of the set."""
    files, read = [], packing.read_image

    def count(item, channels):
        files.append(item)
        return read(item, channels)

    monkeypatch.setattr(packing, "CHUNK", 4)
    monkeypatch.setattr(packing, "read_image", count)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    return files


def test_corrupt_files_are_all_named(tmp_path, image_folder):
    broken = break_three_files(image_folder)
    with pytest.raises(ValueError) as error:
        pack_folder(tmp_path, image_folder, size=16)
    assert "3 of 34 files are no readable images" in str(error.value) and 'corrupt = "skip"' in str(error.value)
    assert all(name in str(error.value) for name in broken)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "images"]


@pytest.mark.parametrize("stopped_before", [False, True])
def test_corrupt_files_are_left_out_on_request(tmp_path, image_folder, decoded, stopped_before):
    broken = break_three_files(image_folder)
    if stopped_before:
        with pytest.raises(ValueError):
            pack_folder(tmp_path, image_folder, size=16)
        decoded.clear()
    manifest = pack_folder(tmp_path, image_folder, size=16, corrupt="skip")
    assert (manifest["train"], manifest["val"], manifest["unreadable"]) == (15, 16, {"train": 2, "val": 1})
    if stopped_before:
        assert decoded == broken, "they alone are tried again"
    lines = (tmp_path / "out/unreadable.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in lines] == broken
    assert all("cannot identify image file" in lines[i] for i in (0, 2)) and "truncated" in lines[1]

    for name in broken:
        Path(name).unlink()
    pack_folder(tmp_path, image_folder, size=16, out=str(tmp_path / "without"))
    ours, reference = contents(tmp_path / "out"), contents(tmp_path / "without")
    assert ours.keys() == reference.keys() and reference["unreadable.txt"] == b""
    assert all(ours[name] == reference[name] for name in ours if name.endswith(".npy"))
    expected = {**json.loads(ours["manifest.json"]), "unreadable": {"train": 0, "val": 0}}
    assert json.loads(reference["manifest.json"]) == expected


def test_a_set_without_a_readable_image_is_refused(tmp_path, image_folder):
    for path in image_folder.glob("train/*/*"):
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"none of the 16 training images can be read:\n.*/0.png: cannot identify"):
        pack_folder(tmp_path, image_folder, size=16, corrupt="skip")
    assert not (tmp_path / "out").exists()


def test_a_killed_pack_goes_on_where_it_was(tmp_path, image_folder, decoded, monkeypatch):
    pack_folder(tmp_path, image_folder, size=16, out=str(tmp_path / "whole"))
    every = list(decoded)
    with monkeypatch.context() as patch:
        patch.setattr(packing, "_decode", lambda *args, decode=packing._decode: time.sleep(0.03) or decode(*args))
        fork = multiprocessing.get_context("fork")  # has all modules loaded
        child = fork.Process(target=pack_folder, args=(tmp_path, image_folder), kwargs={"size": 16})
        child.start()
    log, deadline = tmp_path / ".out.partial/train_done.jsonl", time.monotonic() + 60
    while not (log.exists() and log.read_bytes().count(b"\n") >= 2):
        assert child.is_alive() and time.monotonic() < deadline
        time.sleep(0.005)
    child.kill()
    child.join()
    assert not (tmp_path / "out").exists()
    done = 4 * log.read_bytes().count(b"\n")
    with log.open("a") as file:
        file.write('{"identity": "a line that the kill cut sho')

    decoded.clear()
    pack_folder(tmp_path, image_folder, size=16)
    assert len(every) == 32 and 8 <= done < 16 and decoded == every[done:]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out", "whole"]


def interrupt(tmp_path, image_folder, monkeypatch, after=10):
    """Packs until Ctrl-C during the image of that number: in chunks of 4, two are done."""
    images, read = [], packing.read_image

    def stop(item, channels):
        images.append(item)
        if len(images) > after:
            raise KeyboardInterrupt
        return read(item, channels)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(packing, "read_image", stop)
        pack_folder(tmp_path, image_folder, size=16)


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        (lambda images: None, 8),
        (lambda images: shutil.copy(images / "train/light/0.png", images / "train/dark/5.png"), 4),
        (lambda images: os.utime(images / "train/dark/0.png", (1, 1)), 0),
        (lambda images: (images / "train/dark/7.png").unlink(), 4),
        (lambda images: shutil.copy(images / "train/light/0.png", images / "train/dark/00.png"), 0),
    ],
    ids=["nothing", "content", "time", "removed", "added"],
)
def test_changed_files_are_decoded_again(tmp_path, image_folder, decoded, monkeypatch, change, kept):
    """From the chunk of the first of them on, since rows after it may have moved."""
    interrupt(tmp_path, image_folder, monkeypatch)
    change(image_folder)
    decoded.clear()
    pack_folder(tmp_path, image_folder, size=16)
    again = list(decoded)
    pack_folder(tmp_path, image_folder, size=16, out=str(tmp_path / "anew"))
    assert again == decoded[len(again) :][kept:]
    assert contents(tmp_path / "out") == contents(tmp_path / "anew")


@pytest.mark.parametrize("changes", [{"size": 8}, {"size": 16, "channels": 1}])
def test_other_settings_start_anew(tmp_path, image_folder, decoded, monkeypatch, changes):
    interrupt(tmp_path, image_folder, monkeypatch)
    decoded.clear()
    pack_folder(tmp_path, image_folder, **changes)
    assert len(decoded) == 32
    pack_folder(tmp_path, image_folder, **changes, out=str(tmp_path / "anew"))
    assert contents(tmp_path / "out") == contents(tmp_path / "anew")


def test_a_lost_part_of_an_interrupted_pack_is_made_again(tmp_path, image_folder, decoded, monkeypatch):
    interrupt(tmp_path, image_folder, monkeypatch)
    (tmp_path / ".out.partial/train_images.npy").unlink()
    decoded.clear()
    pack_folder(tmp_path, image_folder, size=16)
    assert len(decoded) == 32


def test_files_that_have_become_readable_are_found(tmp_path, image_folder, decoded, monkeypatch):
    """A permission, or a disk that was away: nothing about the file itself changes."""
    read, denied = packing.read_image, str(image_folder / "train/dark/5.png")

    def deny(item, channels):
        if item == denied:
            raise PermissionError("denied")
        return read(item, channels)

    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"1 of 32 files.*[\s\S]*5.png: denied"):
        patch.setattr(packing, "read_image", deny)
        pack_folder(tmp_path, image_folder, size=16)
    decoded.clear()
    assert pack_folder(tmp_path, image_folder, size=16, corrupt="skip")["train"] == 16
    assert len(decoded) == 1 + 12, "the file, then the training images from its chunk on"


def test_a_full_disk_is_noticed_first(tmp_path, image_folder, decoded, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**7))
    with pytest.raises(OSError) as error:
        pack_folder(tmp_path, image_folder, size=512)  # 32 images of 0.8 MB
    assert f"{tmp_path}: packing needs 0.03 GB more there, but only 0.01 GB are free" in str(error.value)
    assert not decoded and sorted(path.name for path in tmp_path.iterdir()) == ["images"]


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
    Path(packed_folder, "val_files.npy").unlink()
    with pytest.raises(ValueError, match=r"packed by an earlier version \(it has no val_files.npy\); pack it again"):
        open_packed(packed_folder)


def test_failure_keeps_the_packed_folder_of_before(tmp_path, image_folder):
    pack_folder(tmp_path, image_folder, size=16)
    (image_folder / "train/dark/broken.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError):
        pack_folder(tmp_path, image_folder, size=16)
    assert len(open_packed(str(tmp_path / "out")).train.images) == 16


def test_bad_folders(tmp_path, image_folder):
    with pytest.raises(ValueError, match=r"path = .*nowhere.*: must be an existing folder"):
        pack_folder(tmp_path, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="a folder that holds images"):
        pack_folder(tmp_path, tmp_path / "empty")
    (image_folder / "val/unseen").mkdir()
    with pytest.raises(ValueError, match=r"has classes that .*train lacks: unseen"):
        pack_folder(tmp_path, image_folder)
    with pytest.raises(ValueError, match=r"there is no packed data set.*01_data.ipynb"):
        open_packed(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "imagenet21k"}, "data = 'imagenet21k': must be one of mnist5k, cifar10"),
        ({"channels": 2}, "channels = 2: must be 1, 3 or 4"),
        ({"size": "32"}, "size = '32' (str): must be of type int"),
        ({"data": "folder"}, "path = '': must be the image folder"),
        ({"path": "somewhere"}, "path = 'somewhere': must be empty unless data is 'folder'"),
        ({"corrupt": "ignore"}, "corrupt = 'ignore': must be one of stop, skip"),
        ({"statistics": "imagenet"}, "statistics = 'imagenet': must be 'dataset' unless RGB"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError) as error:
        DataSettings(**changes)
    assert message in str(error.value)


def test_labelled_subset(generator):
    labels = np.repeat(np.arange(10), 50)
    chosen = labelled_subset(labels, 100, generator)
    assert len(set(chosen.tolist())) == 100 and (np.bincount(labels[chosen]) == 10).all()
    again = labelled_subset(labels, 100, torch.Generator().manual_seed(0))
    assert np.array_equal(chosen, again)
    with pytest.raises(ValueError, match=r"labels = 15: must be 0 \(all\) or a multiple of the 10 classes"):
        labelled_subset(labels, 15, generator)
    with pytest.raises(ValueError, match="labels = 510: must be at most 500"):
        labelled_subset(labels, 510, generator)


def test_crops_are_distributed_like_torchvisions(generator):
    """Mean and spread of left, top, width and height over 4,000 draws agree with RandomResizedCrop's."""
    image = torch.empty(3, 120, 200)
    torch.manual_seed(0)
    reference = torch.tensor(
        [RandomResizedCrop.get_params(image, (0.67, 1), (3 / 4, 4 / 3)) for _ in range(4000)]
    ).float()
    top, left, height, width = reference.T
    boxes = random_resized_boxes(torch.tensor([[200.0, 120.0]]).repeat(4000, 1), 0.67, generator)
    left_, top_, right_, bottom_ = (boxes * torch.tensor([200, 120, 200, 120])).T
    for ours, theirs in ((left_, left), (top_, top), (right_ - left_, width), (bottom_ - top_, height)):
        assert abs(ours.mean() - theirs.mean()) < 2.5 and abs(ours.std() - theirs.std()) < 2.5
    assert boxes.min() >= 0 and boxes.max() <= 1


def test_crop_cuts_the_box(generator):
    images = torch.rand(2, 3, 8, 8) * 255
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.25, 0.5, 0.75, 1.0]])
    torch.testing.assert_close(crop(images, boxes, 8)[0], images[0])
    torch.testing.assert_close(crop(images, boxes, 4)[1], images[1, :, 4:8, 2:6])
    flipped = crop(images, boxes[:, [2, 1, 0, 3]], 8)
    torch.testing.assert_close(flipped[0], images[0].flip(-1))


def test_centre_crop_has_the_right_shape():
    left, top, right, bottom = centre_boxes(torch.tensor([[200.0, 100.0]]), 0.8)[0].tolist()
    assert [round((right - left) * 200), round((bottom - top) * 100)] == [80, 80]


def test_batches_are_reproducible_and_cover_the_set(packed_folder):
    packed = open_packed(packed_folder)

    def epoch(seed):
        shuffled = batches(packed.train, packed, 16, 4, seed, scale=0.5, flip=True)
        assert len(shuffled) == 4
        return [images for images, _ in shuffled]

    assert all(torch.equal(a, b) for a, b in zip(epoch(1), epoch(1), strict=True))
    assert not torch.equal(epoch(1)[0], epoch(2)[0])
    plain = batches(packed.val, packed, 16, 5)
    assert [len(labels) for _, labels in plain] == [5, 5, 5, 1] and len(plain) == 4


def test_manifest_describes_the_set(packed_folder):
    manifest = json.loads(Path(packed_folder, "manifest.json").read_text())
    assert manifest["classes"] == ["dark", "light"] and manifest["size"] == 16 and len(manifest["mean"]) == 3


def test_arrays_of_twelve_channels(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "arrays").mkdir()
    stack = rng.integers(0, 255, (5, 16, 24, 12), dtype=np.uint8)
    for i, array in enumerate(stack):
        np.save(tmp_path / f"arrays/{i}.npy", array)
    pack_folder(tmp_path, tmp_path / "arrays", size=16, channels=12)
    packed = open_packed(str(tmp_path / "out"))
    assert packed.train.images.shape == (5, 16, 16, 12) and packed.train.sizes.tolist() == [[24, 16]] * 5
    assert abs(packed.train.images.mean() - stack.mean()) < 2 and len(packed.mean) == 12

    np.save(tmp_path / "arrays/float.npy", stack[0].astype(np.float32))
    (tmp_path / "arrays/empty.npy").touch()
    with pytest.raises(ValueError, match=r"float.npy: an array of float32 \[16, 24, 12\], must be uint8") as error:
        pack_folder(tmp_path, tmp_path / "arrays", size=16, channels=12)
    assert "empty.npy: No data left in file" in str(error.value)


def test_image_files_have_no_twelve_channels(tmp_path, image_folder):
    with pytest.raises(ValueError, match=r"an image file has 1, 3 or 4 channels; 12 come from .npy arrays only"):
        pack_folder(tmp_path, image_folder, size=16, channels=12)


def test_wide_images_are_centre_cropped(tmp_path):
    """Without a random crop a wide image loses its sides, not its proportions."""
    (tmp_path / "wide/a").mkdir(parents=True)
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, 8:24] = 200  # the middle square
    Image.fromarray(pixels).save(tmp_path / "wide/a/0.png")
    pack_folder(tmp_path, tmp_path / "wide", size=32)
    packed = open_packed(str(tmp_path / "out"))
    for seed in (None, 0):
        images, _ = next(iter(batches(packed.train, packed, 16, 1, seed)))
        assert (to_pixels(images, packed)[0, :, 1:-1] * 255 - 200).abs().max() < 5


def test_training_images_can_be_held_out(tmp_path, image_folder):
    """To choose a recipe on: the validation images are not touched."""
    manifest = pack_folder(tmp_path, image_folder, size=16, holdout_per_class=3)
    packed = open_packed(str(tmp_path / "out"))
    assert (manifest["train"], manifest["val"]) == (10, 6) and packed.val.labels.tolist() == [0, 0, 0, 1, 1, 1]
    files = [set(split.files.tolist()) for split in (packed.train, packed.val)]
    assert len(files[0] | files[1]) == 16 and all(b"/train/" in file for file in files[0] | files[1])


def test_an_image_folder_takes_the_place_of_a_download(tmp_path, image_folder, monkeypatch):
    (tmp_path / "data").mkdir()
    image_folder.rename(tmp_path / "data/cifar10")
    monkeypatch.chdir(tmp_path)
    manifest = pack(DataSettings(data="cifar10", size=16, channels=3, out="packed"))
    assert manifest["train"] == 16 and manifest["data"] == "cifar10 (files of data/cifar10)"
