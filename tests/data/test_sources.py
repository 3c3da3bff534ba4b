from pathlib import Path

import numpy as np
import pytest

from conftest import write_images
from packed_sets import pack_folder
from simmimlib.data import sources
from simmimlib.data.packed import open_packed
from simmimlib.data.packing import pack
from simmimlib.data.sources import DataSettings, read_image


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


def test_image_files_have_no_twelve_channels(tmp_path, image_folder):
    with pytest.raises(ValueError, match=r"an image file has 1, 3 or 4 channels; 12 come from .npy arrays only"):
        pack_folder(tmp_path, image_folder, size=16, channels=12)


def test_an_image_folder_takes_the_place_of_a_download(tmp_path, image_folder, monkeypatch):
    (tmp_path / "data").mkdir()
    image_folder.rename(tmp_path / "data/cifar10")
    monkeypatch.chdir(tmp_path)
    manifest = pack(DataSettings(data="cifar10", size=16, channels=3, out="packed"))
    assert manifest["train"] == 16 and manifest["data"] == "cifar10"


def test_nested_and_hidden_files(tmp_path):
    """Folders below a class belong to it; what begins with a dot is not looked at."""
    root = write_images(tmp_path / "images", splits=("train",), count=2)
    write_images(root / "train/dark", splits=("more",), classes=("below",), count=1)
    (root / "train/.cache").mkdir()
    (root / "train/dark/.DS_Store").write_bytes(b"no image")
    source = sources.image_folder(str(root))
    assert source.name == "images" and source.classes == ["dark", "light"] and source.val == []
    assert [(str(Path(path).relative_to(root / "train")), label) for path, label in source.train] == [
        ("dark/0.png", 0),
        ("dark/1.png", 0),
        ("dark/more/below/0.png", 0),
        ("light/0.png", 1),
        ("light/1.png", 1),
    ]


@pytest.mark.parametrize(("channels", "shape"), [(1, (5, 7)), (3, (5, 7)), (4, (5, 7))])
def test_arrays_are_converted_to_the_wanted_channels(channels, shape):
    grey = np.arange(35, dtype=np.uint8).reshape(shape)
    read = read_image(grey, channels)
    assert read.shape == (5, 7, channels) and np.array_equal(read[..., 0], grey)


def test_grey_npy_arrays_need_no_axis_of_channels(tmp_path):
    grey = np.arange(35, dtype=np.uint8).reshape(5, 7)
    np.save(tmp_path / "grey.npy", grey)
    assert np.array_equal(read_image(str(tmp_path / "grey.npy"), 1), grey[..., None])
    with pytest.raises(ValueError, match=r"an array of uint8 \[5, 7, 1\], must be uint8 \[height, width, 3\]"):
        read_image(str(tmp_path / "grey.npy"), 3)


def test_pickled_arrays_are_never_unpickled(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([Path()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        read_image(str(tmp_path / "objects.npy"), 1)


def test_digits_are_padded_evenly_to_32_pixels(white_digits):
    source = sources.find_images(DataSettings())
    image, label = source.val[-1]
    assert label == 9 and image.shape == (32, 32) and image.sum() == 28 * 28 and image[2:-2, 2:-2].all()


def test_class_folders_beside_a_val_folder(tmp_path):
    root = write_images(tmp_path / "images", splits=(".", "val"), count=2)
    source = sources.image_folder(str(root))
    assert source.classes == ["dark", "light"] and [label for _, label in source.train] == [0, 0, 1, 1]
    assert len(source.val) == 4 and all("/val/" in path for path, _ in source.val)


def test_a_set_has_the_name_of_its_folder(image_folder, monkeypatch):
    monkeypatch.chdir(image_folder)
    assert sources.image_folder(".").name == "images"


def test_a_linked_folder_has_the_name_of_the_link(tmp_path, image_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/cifar10").symlink_to(image_folder)
    assert sources.find_images(DataSettings(data="cifar10", channels=3)).name == "cifar10"


def test_files_without_an_images_extension_are_left_out_and_counted(tmp_path):
    root = write_images(tmp_path / "images", count=2)
    (root / "train/dark/0.png").rename(root / "train/dark/0.PNG")
    for name in ("train/dark/boxes.txt", "train/dark/Thumbs.db", "val/light/README"):
        (root / name).write_text("no image")
    source = sources.image_folder(str(root))
    assert [Path(path).name for path, _ in source.train] == ["0.PNG", "1.png", "0.png", "1.png"]
    assert len(source.val) == 4
    assert [Path(path).name for path in source.other_files] == ["Thumbs.db", "boxes.txt", "README"]
    assert pack_folder(tmp_path, root, size=16)["other_files"] == 3
    for path in (root / "train").rglob("*.*"):
        path.rename(path.with_suffix(".text"))
    with pytest.raises(ValueError, match=r"a folder that holds images; .*nor has a file of another kind: .*\.text"):
        sources.image_folder(str(root))


def test_tiny_imagenets_own_layout(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    for name in ("n01", "n02"):
        write_images(root / "train", splits=(name,), classes=("images",), count=2)
        (root / f"train/{name}/{name}_boxes.txt").write_text("0.png\t0\t0\t9\t9\n")
    write_images(root, splits=("val",), classes=("images",), count=3)
    write_images(root, splits=("test",), classes=("images",), count=1)
    (root / "val/val_annotations.txt").write_text("".join(f"{i}.png\tn0{2 - i % 2}\t0\t0\t9\t9\n" for i in range(3)))
    source = sources.image_folder(str(root))
    assert source.classes == ["n01", "n02"] and [label for _, label in source.train] == [0, 0, 1, 1]
    assert [(Path(path).name, label) for path, label in source.val] == [("0.png", 1), ("1.png", 0), ("2.png", 1)]
    assert len(source.other_files) == 2 and pack_folder(tmp_path, root, size=16)["val"] == 3

    (root / "val/val_annotations.txt").unlink()
    with pytest.raises(ValueError, match=r"val has classes that .*train lacks: images"):
        sources.image_folder(str(root))


def test_validation_images_need_their_classes(tmp_path):
    root = write_images(tmp_path / "images", splits=("train",), count=2)
    write_images(root, splits=("val",), classes=(".",), count=2)
    with pytest.raises(ValueError, match=r"val has no folder of a class, and .*train has: put its images into"):
        sources.image_folder(str(root))
    write_images(root, splits=("val",), classes=("light",), count=2)
    assert [label for _, label in sources.image_folder(str(root)).val] == [1, 1], "it may lack a class"
