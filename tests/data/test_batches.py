"""Batches do not depend on how they are made: by how many processes and workers, from the start or from the middle."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from conftest import write_images
from packed_sets import CPU, KINDS, batches, equal, loop_settings, pack_folder, train
from simmimlib.data.batches import sample_images, training_batches, validation_batches
from simmimlib.data.crops import crop
from simmimlib.data.packed import Split, open_packed
from simmimlib.data.packed_images import to_pixels
from simmimlib.data.packing import pack
from simmimlib.data.sources import DataSettings
from simmimlib.model.masking import MaskGenerator


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_can_be_entered_anywhere(wide, kind):
    masks = MaskGenerator(16, 8, 4, 0.5)
    whole = list(train(wide, masks, **KINDS[kind]).epoch(3))
    assert len(whole) == 2 and whole[0][0].shape == (6, 3, 16, 16) and whole[0][1].shape == (6, 4, 4)
    again = train(wide, masks, **KINDS[kind])
    assert equal(list(again.epoch(3, first=1)), whole[1:])
    assert equal(list(again.epoch(3)), whole) and not equal(list(again.epoch(4)), whole)


@pytest.mark.parametrize("masks", [MaskGenerator(16, 8, 4, 0.5), None], ids=["masks", "labels"])
@pytest.mark.parametrize("kind", KINDS)
def test_processes_share_the_batch_of_one(wide, kind, masks, monkeypatch):
    whole = list(train(wide, masks, **KINDS[kind]).epoch(1))
    parts = []
    monkeypatch.setattr("simmimlib.machine.distributed.world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr("simmimlib.machine.distributed.rank", lambda rank=rank: rank)
        parts.append(list(train(wide, masks, **KINDS[kind]).epoch(1)))
    joined = [tuple(map(torch.cat, zip(*step, strict=True))) for step in zip(*parts, strict=True)]
    assert equal(joined, whole)


@pytest.mark.parametrize("files", [False, True])
def test_validation_reads_everything_in_order(wide, files):
    given = list(validation_batches(wide.val, wide, 16, 5, CPU, files=files))
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


def test_reading_ahead_gives_the_same_batches(wide):
    """What a GPU run does with a set that does not fit there; threads fill the next batch."""
    plain, ahead = train(wide), train(wide)
    ahead.images.ahead = True
    assert equal(list(ahead.epoch(0)), list(plain.epoch(0)))


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


def mapped_kilobytes(name: str) -> int:
    """Resident pages of the mappings of a file, as the system counts them for this process."""
    total, inside = 0, False
    for line in open("/proc/self/smaps"):  # noqa: SIM115, PTH123
        if "-" in line.split()[0] and ":" not in line.split()[0]:
            inside = name in line
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


def test_memory_does_not_grow_with_the_set(wide, tmp_path):
    big = np.lib.format.open_memmap(tmp_path / "big_images.npy", "w+", np.uint8, (4000, 32, 32, 3))
    big[:] = 1
    big.flush()
    del big
    images = np.load(tmp_path / "big_images.npy", mmap_mode="r")
    zeros = np.zeros(4000, int)
    split = Split(images, zeros, np.full((4000, 2), 32), zeros)
    read = training_batches(loop_settings(batch_size=100, crop_scale=1.0, image_size=32), split, wide, CPU)
    for _ in read.epoch(0):
        assert mapped_kilobytes("big_images") < 4000, "of 12,000"


def test_half_of_the_crops_are_flipped_and_are_mirror_images(wide):
    """The same boxes with and without flips: each image is as it was, or mirrored."""
    mirrored = []
    for epoch in range(10):
        plain, flipped = (train(wide, flip=flip, crop_scale=0.4).epoch(epoch) for flip in (False, True))
        for (before, _), (after, _) in zip(plain, flipped, strict=True):
            for one, two in zip(before, after, strict=True):
                mirror = torch.allclose(one.flip(-1), two, atol=1e-3)
                assert mirror != torch.allclose(one, two, atol=1e-3)
                mirrored.append(mirror)
    assert len(mirrored) == 120 and 40 < sum(mirrored) < 80


def test_whole_images_are_flipped_too(packed_folder):
    packed = open_packed(packed_folder)
    kinds = set()
    images = [next(iter(batches(packed.train, packed, 16, 16, 0, flip=flip)))[0] for flip in (False, True)]
    for one, two in zip(*images, strict=True):
        kinds.add((torch.allclose(one, two, atol=1e-3), torch.allclose(one.flip(-1), two, atol=1e-3)))
    assert kinds == {(True, False), (False, True)}


def test_crops_are_as_large_as_the_settings_say(wide):
    """Random crops of the arrays and of the files show as much of the picture: at a scale of 1 nothing is cut off."""
    boxes = train(wide, crop_scale=0.3, flip=False).images._boxes(0, 0, torch.arange(6))
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    assert area.min() > 0.27 and area.max() <= 1 and area.std() > 0.05
    whole = train(wide, crop_scale=1.0, flip=False).images._boxes(0, 0, torch.arange(6))
    torch.testing.assert_close(whole[0], torch.tensor([0.5 - 10 / 28, 0, 0.5 + 10 / 28, 1]))


@pytest.fixture
def mixed(tmp_path):
    """8 square and 8 wide images, in turn."""
    for name, size in (("square", (20, 20)), ("wide", (28, 20))):
        write_images(tmp_path / "noise", splits=(".",), classes=(name,), size=size)
    (tmp_path / "images").mkdir()
    for i in range(8):
        for position, name in enumerate(("square", "wide")):
            (tmp_path / f"noise/{name}/{i}.png").rename(tmp_path / f"images/{2 * i + position:02}.png")
    pack_folder(tmp_path, tmp_path / "images", size=24)
    return open_packed(str(tmp_path / "out"))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_how_an_image_is_resized_does_not_depend_on_its_neighbours(mixed, interpolation):
    def images(batch_size):
        read = validation_batches(mixed.train, mixed, 12, batch_size, CPU, interpolation=interpolation)
        return torch.cat([images for images, _ in read])

    together = images(16)
    assert {tuple(size) for size in mixed.train.sizes.tolist()} == {(20, 20), (28, 20)}
    assert all(torch.equal(images(batch_size), together) for batch_size in (1, 3, 8))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_square_images_are_antialiased(packed_folder, interpolation):
    packed = open_packed(packed_folder)
    images = torch.from_numpy(np.array(packed.val.images)).permute(0, 3, 1, 2).float()
    expected = F.interpolate(images, (8, 8), mode=interpolation, antialias=True).clamp(0, 255).permute(0, 2, 3, 1)
    given, _ = next(iter(validation_batches(packed.val, packed, 8, 16, CPU, interpolation=interpolation)))
    torch.testing.assert_close(to_pixels(given, packed) * 255, expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_training_crops_are_cut_as_the_settings_say(wide, interpolation):
    read = train(wide, interpolation=interpolation)
    rows = read.rows(1)[0]
    stored = torch.from_numpy(wide.train.images[rows.numpy()]).permute(0, 3, 1, 2).float()
    expected = crop(stored, read.images._boxes(1, 0, rows), 16, interpolation).permute(0, 2, 3, 1)
    images, _ = next(read.epoch(1))
    torch.testing.assert_close(to_pixels(images, wide) * 255, expected, rtol=0, atol=1e-2)


def test_square_images_are_centre_cropped_too(packed_folder):
    packed = open_packed(packed_folder)
    given, _ = next(iter(validation_batches(packed.val, packed, 8, 16, CPU, crop_pct=0.5)))
    np.testing.assert_allclose(to_pixels(given, packed) * 255, packed.val.images[:, 4:12, 4:12], atol=1e-2)


@pytest.mark.parametrize("crop_pct", [0.5, 1.0])
def test_the_centre_crop_of_the_files_has_the_same_share(packed_folder, crop_pct):
    packed = open_packed(packed_folder)
    side = round(16 * crop_pct)
    cut = slice(8 - side // 2, 8 + side // 2)
    read = validation_batches(packed.val, packed, side, 16, CPU, crop_pct=crop_pct, files=True)
    images, _ = next(iter(read))
    np.testing.assert_allclose(to_pixels(images, packed) * 255, packed.val.images[:, cut, cut], atol=1e-2)


def training_pictures(packed, **changes):
    """Square images of one epoch as pixels of 255, in the order of the set; nothing is cut off or jittered."""
    read = train(packed, **{"batch_size": 16, "crop_scale": 1.0, "flip": False} | changes)
    images, _ = next(iter(read))
    pictures = to_pixels(images, packed) * 255
    return pictures[read.rows(0)[0].argsort()].numpy()


@pytest.mark.parametrize("source", ["packed", "files"])
def test_without_crops_and_flips_images_are_as_they_were(packed_folder, source):
    packed = open_packed(packed_folder)
    np.testing.assert_allclose(training_pictures(packed, source=source), packed.train.images, atol=1e-2)


@pytest.mark.parametrize("source", ["packed", "files"])
def test_only_flips_mirror_images(packed_folder, source):
    packed = open_packed(packed_folder)
    mirrored = 0
    for image, picture in zip(packed.train.images, training_pictures(packed, source=source, flip=True), strict=True):
        mirror = np.allclose(picture, image[:, ::-1], atol=1e-2)
        assert mirror != np.allclose(picture, image, atol=1e-2)
        mirrored += mirror
    assert 2 < mirrored < 14


def test_files_are_cropped_to_the_smallest_share_at_most(wide):
    """A picture of its own coordinates tells how much of it is left."""
    left = []
    for share in (0.3, 0.9):
        transform = train(wide, source="files", crop_scale=share, flip=False).images.loader.dataset.transform
        torch.manual_seed(0)
        columns, rows = np.meshgrid(np.arange(100), np.arange(100))
        picture = Image.fromarray(np.stack([columns, rows, rows], 2).astype(np.uint8))
        spans = [(image.amax((1, 2)) - image.amin((1, 2)))[:2] for image in (transform(picture) for _ in range(50))]
        sides = torch.stack(spans) * torch.tensor(wide.std[:2]) * 255 / 100 * 16 / 15  # from the outer pixels' middles
        left.append(sides.prod(1))
    assert 0.25 < left[0].min() < 0.45 and left[0].max() > 0.85 and left[1].min() > 0.8


def test_colours_are_jittered_where_it_is_asked_for(packed_folder):
    packed = open_packed(packed_folder)
    for source in ("packed", "files"):
        pictures = training_pictures(packed, source=source, color_jitter=0.5)
        change = np.abs(pictures - packed.train.images).mean((1, 2, 3))
        assert (change > 5).mean() > 0.5


def test_pixels_to_show_stay_between_black_and_white(packed_folder):
    packed = open_packed(packed_folder)
    shown = to_pixels(torch.tensor([-100.0, 100.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1), packed)
    assert shown[0].eq(0).all() and shown[1].eq(1).all()


def test_a_batch_that_is_larger_than_the_set_is_refused(wide):
    with pytest.raises(ValueError, match=r"^batch_size = 17: must be at most 16, the images to train on$"):
        train(wide, batch_size=17)
    assert len(list(train(wide, batch_size=16))) == 1


def test_validation_masks_are_the_same_each_time(wide):
    masks = MaskGenerator(16, 8, 4, 0.5)
    read = validation_batches(wide.val, wide, 16, 6, CPU, masks)
    first, again = list(read), list(read)
    assert equal(first, again) and [len(images) for images, _ in first] == [6, 6, 4]
    assert all(mask.shape == (len(images), 4, 4) for images, mask in first)
    assert not torch.equal(first[0][1], first[1][1]), "each step has masks of its own"


def test_steps_and_epochs_draw_anew(wide):
    masks = MaskGenerator(16, 4, 4, 0.5)
    read = train(wide, masks)
    steps = [*read.epoch(0), *read.epoch(1), *train(wide, masks, seed=1).epoch(0)]
    drawn = {tuple(mask.flatten().tolist()) for _, mask in steps}
    boxes = {tuple(read.images._boxes(e, s, torch.arange(6)).flatten().tolist()) for e in range(2) for s in range(2)}
    assert len(drawn) == len(steps) == 6 and len(boxes) == 4
    orders = {tuple(torch.cat(train(wide, seed=seed).rows(epoch)).tolist()) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4 and all(len(set(order)) == 12 for order in orders)


def test_labels_go_with_their_images(wide):
    for images, labels in train(wide, flip=False).epoch(2):
        assert set(labels.tolist()) <= {0, 1}
        assert torch.equal(images.mean((1, 2, 3)) > 0, labels == 1)  # the light ones


@pytest.mark.parametrize(("count", "rows"), [(1, [0]), (2, [0, 15]), (5, [0, 3, 7, 11, 15]), (100, list(range(16)))])
def test_sample_images_are_evenly_spaced_and_normalised(packed_folder, count, rows):
    packed = open_packed(packed_folder)
    images = sample_images(packed.val, packed, 16, count)
    assert images.device == CPU and images.shape == (len(rows), 3, 16, 16)
    np.testing.assert_allclose(to_pixels(images, packed) * 255, packed.val.images[rows], atol=1e-3)
    raw = packed.val.images[rows] / 255
    np.testing.assert_allclose(images.permute(0, 2, 3, 1), (raw - packed.mean) / packed.std, atol=1e-4)
    assert sample_images(packed.val, packed, 8, count).shape == (len(rows), 3, 8, 8)


def test_the_centre_crop_shows_its_share_of_the_shorter_side(wide):
    whole, centre = (
        torch.cat([images for images, _ in validation_batches(wide.val, wide, 16, 16, CPU, crop_pct=share)])
        for share in (1.0, 0.5)
    )
    stored = torch.from_numpy(np.array(wide.val.images)).permute(0, 3, 1, 2).float()
    for images, share in ((whole, 1.0), (centre, 0.5)):
        half = torch.tensor([share * 20 / 28 / 2, share / 2] * 2)  # of width and height
        box = torch.tensor([0.5, 0.5, 0.5, 0.5]) + half * torch.tensor([-1, -1, 1, 1])
        expected = crop(stored, box.repeat(16, 1), 16).permute(0, 2, 3, 1)
        torch.testing.assert_close(to_pixels(images, wide) * 255, expected, rtol=0, atol=1e-2)
