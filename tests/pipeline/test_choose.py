"""A profile's values for a folder of images: every one is valid, whatever the images are."""

import os
from collections import Counter

import numpy as np
import pytest

from simmimlib import DataSettings, FinetuneSettings, PretrainSettings, ProbeSettings
from simmimlib.data.sources import Source
from simmimlib.pipeline.choose import LADDER, Choice, best_masks, choose_data, choose_model, choose_recipe, rungs, warn
from simmimlib.pipeline.look import Look


def seen(classes=10, each=500, val=100, size=(32, 32), kind="RGB", **changes):
    """A look at images that do not exist."""
    names = [f"class{i}" for i in range(classes)]
    train, held = ([(f"{i}-{j}.png", i if classes else -1) for i in range(max(1, classes)) for j in range(count)]
                   for count in (each, val))  # fmt: skip
    source = Source("mine", train, held, names)
    values = {"source": source, "decoded": 100, "unreadable": [], "sizes": np.array([size] * 100)}
    values |= {"kinds": Counter({kind: 100}), "compared": len(held), "duplicates": []}
    return Look(**values | changes)


def chosen(look, rung=LADDER[-1], images=(100_000, 50_000)):
    choice = Choice(look)
    choose_data(choice, "somewhere", rung.model(look.side)["image_size"])
    choose_model(choice, rung)
    choose_recipe(choice, rung, *images)
    warn(choice)
    return choice


def check(choice):
    """What the stages would be given is accepted, and enough images are there for it."""
    values, count = choice.values, int(choice.training_counts.sum())
    DataSettings.from_values(values["data"])
    PretrainSettings.from_values({**values["model"], **values["pretrain"]})
    assert values["pretrain"]["batch_size"] <= count
    if not choice.look.labelled:
        return
    classes, rarest = len(choice.look.source.classes), choice.training_counts.min()
    tuned = FinetuneSettings.from_values({**values["model"], **values["finetune"]})
    probe = ProbeSettings.from_values({**values["model"], **values["probe"]})
    for labelled in (tuned.labelled_images, probe.labelled_images):
        assert labelled % classes == 0 and labelled <= rarest * classes
    assert tuned.batch_size <= (tuned.labelled_images or count) and probe.k <= probe.labelled_images
    assert probe.labelled_images >= 2 * classes


@pytest.mark.parametrize("rung", LADDER)
@pytest.mark.parametrize("side", [8, 40, 100, 300])
def test_every_encoder_has_masks_in_the_papers_range(rung, side):
    model = rung.model(side)
    mask_patch, ratio, share = best_masks(model["image_size"], model["image_size"] // rung.tokens)
    assert 0.05 <= share <= 0.08 and 0.4 <= ratio <= 0.7
    PretrainSettings.from_values({**model, "mask_patch_size": mask_patch, "mask_ratio": ratio})
    assert model["image_size"] <= max(side, min(rung.sizes))


def test_at_192_pixels_the_masks_are_the_papers():
    assert best_masks(192, 4)[:2] == (32, 0.5), "table 1 of the paper: 83.0, its best row"


@pytest.mark.parametrize(
    "look",
    [
        seen(),
        seen(classes=200, each=500, val=50, size=(64, 64)),
        seen(classes=200, each=6, val=0),
        seen(classes=3, each=3, val=0),
        seen(classes=2, each=2, val=1),
        seen(classes=0, each=1000, val=0),
        seen(classes=1, each=50, val=5),
        seen(kind="grey", size=(8, 8)),
        seen(kind="RGBA"),
        seen(kind="array of 7", size=(300, 40)),
        seen(classes=2, each=10_000, size=(500, 375)),
    ],
    ids=lambda look: f"{len(look.source.train)} of {len(look.source.classes)}",
)
@pytest.mark.parametrize("images", [(16_000, 4_000), (10_000_000, 5_000_000)])
def test_values_are_valid(look, images):
    for rung in rungs(look):
        check(chosen(look, rung, images))


def test_small_images_get_small_encoders():
    assert next(rungs(seen(size=(300, 200)))).encoder.startswith("swin")
    assert all(rung.encoder.startswith("vit") for rung in rungs(seen(size=(300, 100))))
    assert chosen(seen(size=(8, 8))).values["model"]["image_size"] == 30
    assert chosen(seen(size=(300, 200))).values["data"]["size"] == 56, "7/6 of 48, so that crops are not enlarged"


def test_validation_images():
    assert "holdout_per_class" not in chosen(seen()).values["data"]
    assert chosen(seen(val=0)).values["data"]["holdout_per_class"] == 100
    assert chosen(seen(val=0, each=6)).values["data"]["holdout_per_class"] == 1
    assert chosen(seen(val=1000)).values["data"]["val_per_class"] == 200
    with pytest.raises(ValueError, match=r"10 classes have fewer than 2 training images beside one to validate on"):
        chosen(seen(val=0, each=2))


def test_channels_and_statistics():
    for kind, channels, statistics in (("RGB", 3, "imagenet"), ("grey", 1, "dataset"), ("array of 7", 7, "dataset")):
        data = chosen(seen(kind=kind)).values["data"]
        assert (data["channels"], data["statistics"]) == (channels, statistics)


def test_what_fits():
    """Labels and epochs follow from the images that there is time for."""
    values = chosen(seen(each=500), images=(50_000, 20_000)).values
    assert values["pretrain"]["epochs"] == 10 and values["finetune"]["labelled_images"] == 1000
    assert values["finetune"]["epochs"] == 20
    values = chosen(seen(each=500), images=(10**7, 10**7)).values
    assert values["pretrain"]["epochs"] == 800 and values["finetune"]["labelled_images"] == 0
    values = chosen(seen(each=5_000), images=(10_000, 20_000)).values
    assert values["pretrain"]["epochs"] == 1 and values["data"]["train_per_class"] == 1000


def test_a_rare_class_leaves_no_labels_out():
    look = seen(each=500)
    kept = [item for item in look.source.train if item[1] or item[0] in ("0-0.png", "0-1.png", "0-2.png")]
    choice = chosen(seen(source=look.source._replace(train=kept)), images=(50_000, 20_000))
    assert choice.training_counts.tolist() == [3] + [500] * 9
    assert choice.values["finetune"]["labelled_images"] == 0 and choice.values["finetune"]["epochs"] == 4
    check(choice)


def test_rates_are_those_of_cifar10_cpu():
    values = chosen(seen(each=5000), LADDER[-2]).values
    assert values["pretrain"]["base_lr"] == 0.032 and values["finetune"]["base_lr"] == 0.016
    assert values["pretrain"]["batch_size"] == 64


@pytest.mark.parametrize(
    ("changes", "images", "warning"),
    [
        ({"each": 100}, (10**6, 10**5), "1000 training images are few"),
        ({}, (20_000, 10_000), "steps of pre-training are few"),
        ({}, (100_000, 10_000), "published gains of nine points"),
        (
            {"val": 10},
            (10**6, 10**5),
            "100 validation images tell little: the standard error of",
        ),
        ({"val": 0, "each": 9}, (10**6, 10**5), "10 validation images tell little"),
        ({"duplicates": [("val/a.png", "train/a.png")]}, (10**6, 10**5), "byte for byte (val/a.png is train/a.png)"),
        ({"unreadable": ["a.png: broken"]}, (10**6, 10**5), "or set `corrupt: skip` (a.png: broken)"),
        ({"size": (300, 100)}, (10**6, 10**5), "validation sees the square in their middle only"),
        ({"size": (8, 8)}, (10**6, 10**5), "8 pixels are enlarged to 30"),
    ],
)
def test_warnings(changes, images, warning):
    assert any(warning in text for text in chosen(seen(**changes), images=images).warnings)


def test_nothing_is_warned_of_where_nothing_is_odd():
    assert chosen(seen(), images=(10**6, 10**5)).warnings == []


def test_the_path_is_whole(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert chosen(seen()).values["data"]["path"] == os.path.join(tmp_path, "somewhere")  # noqa: PTH118
