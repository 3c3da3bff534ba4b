"""What is seen in a folder of images before anything is chosen for it."""

import numpy as np
import pytest
from PIL import Image

from conftest import write_images
from simmimlib.pipeline.look import look, samples


def test_classes_sizes_and_kinds(tmp_path):
    found = look(str(write_images(tmp_path / "images", size=(28, 20))))
    assert found.labelled and found.counts.tolist() == [8, 8] and found.channels == 3 and found.side == 20
    assert found.decoded == 32 and found.kinds == {"RGB": 32} and found.sizes.tolist() == [[28, 20]] * 32
    said = " ".join(found.lines())
    assert "16 training and 16 validation images of 2 classes, 8 training images each" in said
    assert "decoded all 32: 32 RGB; median 28 x 20 pixels, least 28 x 20" in said


@pytest.mark.parametrize(("mode", "channels", "kind"), [("L", 1, "grey"), ("RGBA", 4, "RGBA")])
def test_kinds_of_files(tmp_path, mode, channels, kind):
    found = look(str(write_images(tmp_path / "images", mode=mode)))
    assert found.channels == channels and found.kinds == {kind: 32}


def test_grey_images_and_opaque_ones_are_known_by_their_pixels(tmp_path):
    """Stored as RGB or RGBA, as many programs do."""
    for mode, folder in (("RGB", "a"), ("RGBA", "b")):
        root = write_images(tmp_path / folder, mode="L", splits=("train",), count=2)
        for path in root.rglob("*.png"):
            Image.open(path).convert(mode).save(path)
        assert look(str(root)).channels == 1


def test_images_without_classes(tmp_path):
    found = look(str(write_images(tmp_path / "images", splits=(".",), classes=(".",))))
    assert not found.labelled and found.counts.tolist() == [8] and found.source.val == []
    assert "without classes" in found.lines()[0] and not any("byte for byte" in line for line in found.lines())


def arrays(root, channels, dtype=np.uint8, count=3):
    root.mkdir(parents=True)
    for i in range(count):
        np.save(root / f"{i}.npy", np.full((9, 12, channels), i, dtype))


def test_arrays_of_many_channels(tmp_path):
    arrays(tmp_path / "images/train/a", 7)
    arrays(tmp_path / "images/train/b", 7)
    found = look(str(tmp_path / "images"))
    assert found.channels == 7 and found.kinds == {"array of 7": 6} and found.sizes[0].tolist() == [12, 9]
    assert samples(found, side=8)["a"].shape == (3, 8, 8, 7)
    write_images(tmp_path / "images/train", splits=("c",), classes=(".",), count=1)
    with pytest.raises(ValueError, match=r"images = '6 array of 7, 1 RGB': must be of one number of channels"):
        look(str(tmp_path / "images")).channels  # noqa: B018
    arrays(tmp_path / "images/train/d", 5)
    with pytest.raises(ValueError, match="must be of one number of channels"):
        look(str(tmp_path / "images")).channels  # noqa: B018


def test_what_packing_would_stop_at_is_named(tmp_path):
    root = write_images(tmp_path / "images", count=16)
    (root / "train/dark/0.png").write_bytes((root / "train/dark/0.png").read_bytes()[:200])
    Image.fromarray(np.full((9, 9), 4000, np.uint16)).save(root / "train/dark/deep.png")
    np.save(root / "val/dark/floats.npy", np.zeros((9, 9, 3)))
    (root / "val/dark/boxes.txt").write_text("no image")
    found = look(str(root))
    why = dict(line.split(": ", 1) for line in found.unreadable)
    assert set(why) == {str(root / name) for name in ("train/dark/0.png", "train/dark/deep.png", "val/dark/floats.npy")}
    assert "more than 8 bits (mode I;16)" in why[str(root / "train/dark/deep.png")]
    assert "an array of float64" in why[str(root / "val/dark/floats.npy")]
    assert any("1 other files, without an image's extension, are left out" in line for line in found.lines())


def test_a_half_copied_folder_is_refused(tmp_path):
    root = write_images(tmp_path / "images")
    for path in list(root.rglob("*.png"))[:8]:
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"8 of the 32 images looked at cannot be read, as in a folder that is half"):
        look(str(root))
    with pytest.raises(ValueError, match="must be an existing folder"):
        look(str(tmp_path / "nowhere"))


def test_validation_images_that_are_in_the_training_set_too(tmp_path):
    root = write_images(tmp_path / "images")  # the noise of every folder differs
    assert look(str(root)).duplicates == []
    (root / "val/light/copy.png").write_bytes((root / "train/dark/3.png").read_bytes())
    assert look(str(root)).duplicates == [(str(root / "val/light/copy.png"), str(root / "train/dark/3.png"))]


def test_samples_are_the_square_middle(tmp_path):
    root = tmp_path / "images/train/a"
    root.mkdir(parents=True)
    picture = np.zeros((10, 30, 3), np.uint8)
    picture[:, 10:20] = 255
    Image.fromarray(picture).save(root / "wide.png")
    assert (samples(look(str(tmp_path / "images")), side=10)["a"] == 1).all()
