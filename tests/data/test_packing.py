import json
import multiprocessing
import os
import shutil
import threading
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN as IMAGENET_MEAN
from timm.data import IMAGENET_DEFAULT_STD as IMAGENET_STD

from packed_sets import pack_folder
from simmimlib.data import decoding
from simmimlib.data.packed import open_packed


def break_three_files(image_folder):
    """One that is an image no more, and two that never were; returns their names as messages give them."""
    (image_folder / "train/dark/broken.jpg").write_bytes(b"no image")
    (image_folder / "val/light/notes.PNG").write_text("no image either")
    cut = (image_folder / "train/light/0.png").read_bytes()[:200]
    (image_folder / "train/light/0.png").write_bytes(cut)
    return [str(image_folder / name) for name in ("train/dark/broken.jpg", "train/light/0.png", "val/light/notes.PNG")]


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture
def decoded(monkeypatch):
    """The files that were decoded, in chunks of 4, in the order of the set."""
    files, read = [], decoding.read_image

    def count(item, channels):
        files.append(item)
        return read(item, channels)

    monkeypatch.setattr(decoding, "CHUNK", 4)
    monkeypatch.setattr(decoding, "read_image", count)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    return files


def test_corrupt_files_are_all_named(tmp_path, image_folder):
    broken = break_three_files(image_folder)
    with pytest.raises(ValueError) as error:
        pack_folder(tmp_path, image_folder, size=16)
    assert "3 of 34 files are unreadable" in str(error.value) and 'corrupt = "skip"' in str(error.value)
    assert all(name in str(error.value) for name in broken)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", ".out.partial", "images"]


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
        patch.setattr(decoding, "_decode", lambda *args, decode=decoding._decode: time.sleep(0.03) or decode(*args))
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
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", ".whole.lock", "images", "out", "whole"]


def interrupt(tmp_path, image_folder, monkeypatch, after=10):
    """Packs until Ctrl-C during the image of that number: in chunks of 4, two are done."""
    images, read = [], decoding.read_image

    def stop(item, channels):
        images.append(item)
        if len(images) > after:
            raise KeyboardInterrupt
        return read(item, channels)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(decoding, "read_image", stop)
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
    read, denied = decoding.read_image, str(image_folder / "train/dark/5.png")

    def deny(item, channels):
        if item == denied:
            raise PermissionError("denied")
        return read(item, channels)

    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"1 of 32 files.*[\s\S]*5.png: denied"):
        patch.setattr(decoding, "read_image", deny)
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
    assert not decoded and sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "images"]


def test_failure_keeps_the_packed_folder_of_before(tmp_path, image_folder):
    pack_folder(tmp_path, image_folder, size=16)
    (image_folder / "train/dark/broken.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError):
        pack_folder(tmp_path, image_folder, size=16)
    assert len(open_packed(str(tmp_path / "out")).train.images) == 16


def test_limits_take_the_same_images_again(tmp_path, image_folder):
    first = pack_folder(tmp_path, image_folder, size=16, train_per_class=3, val_per_class=2)
    images = np.array(open_packed(str(tmp_path / "out")).train.images)
    assert (first["train"], first["val"]) == (6, 4)
    pack_folder(tmp_path, image_folder, size=16, train_per_class=3, val_per_class=2)
    np.testing.assert_array_equal(open_packed(str(tmp_path / "out")).train.images, images)


def test_training_images_can_be_held_out(tmp_path, image_folder):
    """To choose a recipe on: the validation images are not touched."""
    manifest = pack_folder(tmp_path, image_folder, size=16, holdout_per_class=3)
    packed = open_packed(str(tmp_path / "out"))
    assert (manifest["train"], manifest["val"]) == (10, 6) and packed.val.labels.tolist() == [0, 0, 0, 1, 1, 1]
    files = [set(split.files.tolist()) for split in (packed.train, packed.val)]
    assert len(files[0] | files[1]) == 16 and all(b"/train/" in file for file in files[0] | files[1])


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


def test_manifest_describes_the_set(packed_folder):
    manifest = json.loads(Path(packed_folder, "manifest.json").read_text())
    assert manifest["classes"] == ["dark", "light"] and manifest["size"] == 16 and len(manifest["mean"]) == 3


def test_the_digest_follows_from_labels_and_pixels(tmp_path, image_folder):
    def digest(path=image_folder, **changes):
        return pack_folder(tmp_path, path, **{"size": 16} | changes)["digest"]

    first = digest()
    shutil.copytree(image_folder, tmp_path / "elsewhere")
    assert len(first) == 16 and first == digest(tmp_path / "elsewhere") == digest(corrupt="skip")
    seen = {first, digest(size=8), digest(channels=1), digest(train_per_class=7), digest(val_per_class=7)}
    (image_folder / "val/dark/7.png").rename(image_folder / "val/light/-.png")  # same pixels in the same order
    seen.add(digest())
    shutil.copy(image_folder / "train/dark/0.png", image_folder / "train/dark/1.png")
    seen.add(digest())
    assert len(seen) == 7


def test_the_manifest_says_what_the_images_follow_from(tmp_path, image_folder):
    manifest = pack_folder(tmp_path, image_folder, size=16, holdout_per_class=2)
    assert manifest["data"] == "images" and json.loads((tmp_path / "out/manifest.json").read_text()) == manifest
    assert manifest["settings"] == {
        "data": "folder",
        "size": 16,
        "channels": 3,
        "train_per_class": 0,
        "val_per_class": 0,
        "holdout_per_class": 2,
        "statistics": "dataset",
    }


@pytest.mark.parametrize("statistics", ["dataset", "imagenet"])
def test_statistics_are_those_of_the_training_images(tmp_path, image_folder, statistics, decoded):
    pack_folder(tmp_path, image_folder, size=16, statistics=statistics)
    packed = open_packed(str(tmp_path / "out"))
    pixels = packed.train.images.reshape(-1, 3) / 255
    expected = (pixels.mean(0), pixels.std(0)) if statistics == "dataset" else (IMAGENET_MEAN, IMAGENET_STD)
    np.testing.assert_allclose([packed.mean, packed.std], expected, atol=1e-6)


def hold(tmp_path, image_folder, held, released):
    """Packs, and waits at the first image."""
    read = decoding.read_image

    def wait(item, channels):
        held.set()
        released.wait(60)
        return read(item, channels)

    decoding.read_image = wait
    try:
        pack_folder(tmp_path, image_folder, size=16)
    finally:
        decoding.read_image = read


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_two_cannot_pack_into_one_folder_at_a_time(tmp_path, image_folder, kind):
    fork = multiprocessing.get_context("fork")  # has all modules loaded
    maker, event = {"thread": (threading.Thread, threading.Event), "process": (fork.Process, fork.Event)}[kind]
    held, released = event(), event()
    other = maker(target=hold, args=(tmp_path, image_folder, held, released))
    other.start()
    try:
        assert held.wait(60)
        with pytest.raises(RuntimeError) as error:
            pack_folder(tmp_path, image_folder, size=16)
        assert str(error.value).startswith(f"out = '{tmp_path / 'out'}': another process is packing into this folder")
        assert not (tmp_path / "out").exists()
    finally:
        released.set()
        other.join(60)
    assert len(open_packed(str(tmp_path / "out")).train) == 16  # the first was not disturbed
    assert pack_folder(tmp_path, image_folder, size=8)["size"] == 8  # and the folder is free again


def test_a_killed_packer_leaves_no_lock(tmp_path, image_folder):
    fork = multiprocessing.get_context("fork")
    held, released = fork.Event(), fork.Event()
    other = fork.Process(target=hold, args=(tmp_path, image_folder, held, released))
    other.start()
    assert held.wait(60)
    other.kill()
    other.join()
    assert pack_folder(tmp_path, image_folder, size=16)["train"] == 16


def test_a_link_to_another_disk_stays_one(tmp_path, image_folder):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk/packed", target_is_directory=True)
    pack_folder(tmp_path, image_folder, size=16)
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk/packed/manifest.json").is_file()


def test_more_than_ten_unreadable_files_are_counted_and_ten_are_named(tmp_path, image_folder):
    for path in [*image_folder.glob("train/dark/*"), *image_folder.glob("val/dark/*")][:12]:
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"^12 of 32 files are unreadable") as error:
        pack_folder(tmp_path, image_folder, size=16)
    lines = str(error.value).split("\n")
    assert len(lines) == 11 and lines[-1].endswith(" and 2 more")


def test_images_are_stored_squashed_by_antialiased_bicubic(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 50, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels).save(tmp_path / "images/0.png")
    np.save(tmp_path / "images/1.npy", pixels)
    pack_folder(tmp_path, tmp_path / "images", size=16)
    stored = open_packed(str(tmp_path / "out")).train.images
    expected = np.asarray(Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC))
    assert all(np.array_equal(image, expected) for image in stored) and len(stored) == 2


def test_nothing_but_the_set_is_left_in_the_packed_folder(tmp_path, image_folder):
    parts = {f"{split}_{part}.npy" for split in ("train", "val") for part in ("images", "labels", "sizes", "files")}
    for _ in range(2):  # anew, and in the place of an earlier one
        pack_folder(tmp_path, image_folder, size=16)
        assert {path.name for path in (tmp_path / "out").iterdir()} == {*parts, "manifest.json", "unreadable.txt"}
        assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "images", "out"]
