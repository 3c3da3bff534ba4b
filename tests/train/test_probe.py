import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from conftest import TINY, write_images
from simmimlib.data.batches import validation_batches
from simmimlib.data.packed import open_packed
from simmimlib.data.packing import pack
from simmimlib.data.sources import DataSettings
from simmimlib.model.encoders import create_encoder
from simmimlib.model.simmim import SimMIM
from simmimlib.train import classifiers, probe
from simmimlib.train.classifiers import STRENGTHS, fit_linear, weighted_vote
from simmimlib.train.features import extract
from simmimlib.train.probe import knn, linear_probe, probe_blocks
from simmimlib.weights.checkpoints import save_model
from simmimlib.weights.export import export_timm
from small_runs import probe_settings


def save_encoder(path, in_chans=3, noise=0.0, **kwargs) -> str:
    torch.manual_seed(0)
    encoder = create_encoder("vit_tiny_patch16_224", 16, in_chans, **{**TINY, **kwargs})
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += noise * torch.randn_like(parameter)
    save_model(path, SimMIM(encoder))
    return str(path)


@pytest.fixture
def similar_folder(tmp_path):
    """16 + 16 images of noise; the two classes differ so little that not all are told apart."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label, name in enumerate(("darker", "lighter")):
            (tmp_path / "similar" / split / name).mkdir(parents=True)
            for i in range(8):
                pixels = (rng.integers(0, 100, (16, 16, 3)) + 3 * label).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "similar" / split / name / f"{i}.png")
    out = str(tmp_path / "packed_similar")
    pack(DataSettings(data="folder", path=str(tmp_path / "similar"), size=16, channels=3, out=out))
    return out


# Classifiers ----------------------------------------------------------------------------------------------------------


def test_the_vote_is_that_of_scikit_learn(monkeypatch, generator):
    monkeypatch.setattr(classifiers, "SIMILARITIES", 1000)  # queries in parts
    train, queries = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (200, 43))
    labels = torch.randint(7, (200,), generator=generator)
    for k, temperature in ((1, 0.07), (20, 0.07), (20, 5.0), (200, 0.5)):
        reference = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda d, t=temperature: np.exp((1 - d) / t)
        ).fit(train, labels)
        assert weighted_vote(train, labels, queries, k, temperature).tolist() == reference.predict(queries).tolist()
    low = weighted_vote(train.float(), labels, queries.float(), 20, 1e-3)  # exp(1 / 0.001) is no float32
    assert low.equal(weighted_vote(train, labels, queries, 1, 1.0))


def much_noise():
    """300 images, 100 numbers each, of which one tells something."""
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(300, 100)) * 10.0 ** rng.integers(-3, 4, 100)).astype(np.float32)
    features[:, 0] = rng.normal(size=300)
    return features, (features[:, 0] + rng.normal(size=300) > 0).astype(int)


def fine_difference():
    """Two numbers that are nearly the same, and the class is which one is larger: that takes large weights."""
    rng = np.random.default_rng(0)
    common, labels = rng.normal(size=300), rng.integers(0, 2, 300)
    features = np.stack([common, common + 0.05 * (labels - 0.5)], axis=1)
    return features + 0.001 * rng.normal(size=features.shape), labels


def test_the_regularisation_is_chosen_on_held_out_training_images():
    features, labels = much_noise()
    classifier, strength = fit_linear(features, labels, seed=0)
    assert strength < 1, "100 numbers, one of them of use: much regularisation"
    assert fit_linear(features, labels, seed=0)[1] == strength
    steps = classifier.named_steps
    np.testing.assert_allclose(steps["standardscaler"].mean_, features.mean(0), rtol=1e-3, atol=1e-3)  # of all of them
    few = fit_linear(features[[0, 1, 2, 3]], np.array([0, 1, 0, 1]), seed=0)[0]
    assert set(few.classes_) == {0, 1}


def test_the_strength_has_a_say():
    (strong, much), (weak, little) = (fit_linear(*make(), seed=0) for make in (much_noise, fine_difference))
    assert much < 1 and little > 1, "C is the inverse of the regularisation's strength"
    for classifier, chosen in ((strong, much), (weak, little)):
        assert chosen == classifier.named_steps["logisticregression"].C, "the classifier is the one that was chosen"
    features, labels = fine_difference()
    assert weak.score(features, labels) > 0.95


def test_of_equal_strengths_the_strongest_is_taken():
    features = np.repeat([[0.0], [100.0]], 20, axis=0)  # any classifier tells these apart
    assert fit_linear(features, np.repeat([0, 1], 20), seed=0)[1] == min(STRENGTHS)


# Runs -----------------------------------------------------------------------------------------------------------------


def test_nothing_is_trained(tmp_path, packed_folder):
    checkpoint = save_encoder(tmp_path / "model.safetensors", drop_path_rate=0.5)
    before = Path(checkpoint).read_bytes()
    changes = probe_settings(packed_folder, tmp_path / "out", checkpoint=checkpoint)
    first, again = knn(changes), knn(changes)
    assert first["top1"] == again["top1"] and Path(checkpoint).read_bytes() == before
    data, model = open_packed(packed_folder), export_timm(changes.start(3), image_size=16)
    batches = validation_batches(data.val, data, 16, 5, torch.device("cpu"))
    features = [extract(model, batches, torch.float32)[0] for _ in range(2)]
    assert features[0].equal(features[1]) and not any(module.training for module in model.modules())
    assert not any(feature.requires_grad for feature in features)


@pytest.mark.parametrize("source", ["checkpoint", "untrained"])
def test_dark_and_light(tmp_path, packed_folder, source):
    checkpoint = save_encoder(tmp_path / "model.safetensors") if source == "checkpoint" else ""
    for run, block, own in ((knn, 0, {"k", "temperature"}), (linear_probe, 1, {"C"})):
        changes = {"checkpoint": checkpoint, "block": block, "labelled_images": 8}
        metrics = run(probe_settings(packed_folder, tmp_path / "out", **changes))
        assert metrics["top1"] == 100 and metrics["labelled_images"] == 8
        assert metrics["features"] == 32 and metrics["block"] == block and metrics["data"] == "images"
        assert {"seed", "device", "precision", "commit", "wall_seconds", *own} < metrics.keys()
        assert metrics == json.loads((tmp_path / f"out/{run.__name__}.json").read_text())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["knn.json", "linear_probe.json"]


def test_an_encoder_at_another_resolution(tmp_path):
    write_images(tmp_path / "images", size=(32, 32))
    pack(DataSettings(data="folder", path=str(tmp_path / "images"), size=32, channels=3, out=str(tmp_path / "packed")))
    checkpoint = save_encoder(tmp_path / "model.safetensors")
    settings = probe_settings(str(tmp_path / "packed"), tmp_path, checkpoint=checkpoint, image_size=32)
    assert knn(settings)["top1"] == 100


def test_every_block_as_the_probe_of_that_block_alone(tmp_path, similar_folder):
    checkpoint = save_encoder(tmp_path / "model.safetensors", noise=0.5, depth=3, drop_path_rate=0.9)
    changes = {"checkpoint": checkpoint, "labelled_images": 12}
    metrics = probe_blocks(probe_settings(similar_folder, tmp_path / "out", raw_pixels=True, **changes))
    assert metrics == json.loads((tmp_path / "out/metrics.json").read_text())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["blocks.csv", "metrics.json"]
    rows = pd.read_csv(tmp_path / "out/blocks.csv").set_index("block")
    assert rows.index.tolist() == [-1, 0, 1, 2, 3] and list(rows) == ["features", "knn", "linear", "C"]
    assert rows["features"].tolist() == [3 * 16 * 16, 32, 32, 32, 32]
    for block in range(4):
        alone = [
            run(probe_settings(similar_folder, tmp_path / "alone", block=block, **changes))
            for run in (knn, linear_probe)
        ]
        assert rows["knn"][block] == alone[0]["top1"] and rows["linear"][block] == alone[1]["top1"], block
        assert rows["C"][block] == alone[1]["C"]
    assert len({tuple(row) for row in rows.loc[0:, ["knn", "linear"]].values}) == 4, "so that taking another one shows"
    for name in ("knn", "linear"):
        blocks = rows[name].loc[1:]
        assert metrics[name] == rows[name][0] and metrics[f"{name}_pixels"] == rows[name][-1]
        assert metrics[f"{name}_best"] == blocks.max() and metrics[f"{name}_best_block"] == blocks.idxmax()
    assert metrics["labelled_images"] == 12 and metrics["data"] == "similar"
    assert {"seed", "data_digest", "device", "precision", "code", "wall_seconds"} < metrics.keys()


def test_raw_pixels_are_those_that_the_encoder_sees(tmp_path, similar_folder):
    """Normalised centre crops, in the order of the split."""
    probe_blocks(probe_settings(similar_folder, tmp_path / "out", raw_pixels=True, crop_pct=0.75))
    rows = pd.read_csv(tmp_path / "out/blocks.csv").set_index("block")
    data = open_packed(similar_folder)
    train, val = (
        torch.cat([images for images, _ in validation_batches(s, data, 16, 16, torch.device("cpu"), crop_pct=0.75)])
        for s in (data.train, data.val)
    )
    labels = torch.from_numpy(np.array(data.train.labels))
    predicted = weighted_vote(train.flatten(1), labels, val.flatten(1), 3, 0.07)
    assert rows["knn"][-1] == 100 * (predicted.numpy() == data.val.labels).mean()
    classifier, strength = fit_linear(train.flatten(1).numpy(), labels.numpy(), seed=0)
    assert rows["linear"][-1] == 100 * classifier.score(val.flatten(1).numpy(), data.val.labels)
    assert rows["C"][-1] == strength


def test_raw_pixels_of_large_images_are_averaged(tmp_path, similar_folder, monkeypatch):
    """Of ImageNet at 192 pixels they would be hundreds of gigabytes."""
    monkeypatch.setattr(probe, "PIXELS_SIDE", 4)
    probe_blocks(probe_settings(similar_folder, tmp_path / "out", raw_pixels=True))
    rows = pd.read_csv(tmp_path / "out/blocks.csv").set_index("block")
    assert rows["features"][-1] == 3 * 4 * 4


def test_without_raw_pixels_there_is_no_such_row(tmp_path, packed_folder):
    metrics = probe_blocks(probe_settings(packed_folder, tmp_path / "out", block=1))  # `block` has no say
    assert pd.read_csv(tmp_path / "out/blocks.csv")["block"].tolist() == [0, 1, 2]
    assert not [name for name in metrics if "pixels" in name]


@pytest.mark.slow
@pytest.mark.parametrize(("run", "batch_size"), [(knn, 5), (linear_probe, 1), (probe_blocks, 5)])
def test_two_processes_as_one(tmp_path, similar_folder, monkeypatch, run, batch_size):
    """Batches of 5 leave one image to the last; of batches of 1 the second process has no share at all."""
    one = run(probe_settings(similar_folder, tmp_path / "one", batch_size=16, raw_pixels=True))
    monkeypatch.setenv("SIMMIM_PROCESSES", "2")
    two = run(probe_settings(similar_folder, tmp_path / "two", batch_size=batch_size, raw_pixels=True))
    assert 50 < one["knn" if run is probe_blocks else "top1"] < 100
    assert one.keys() == two.keys()
    assert all(one[name] == two[name] for name in one.keys() - {"device", "commit", "wall_seconds"})
    name = "metrics" if run is probe_blocks else run.__name__
    assert two == json.loads((tmp_path / f"two/{name}.json").read_text())
    if run is probe_blocks:
        assert (tmp_path / "one/blocks.csv").read_text() == (tmp_path / "two/blocks.csv").read_text()


# Messages -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "changes", "message"),
    [
        (knn, {"k": 17}, "k = 17: must be at most 16, the number of training images"),
        (knn, {"k": 3, "labelled_images": 2}, "k = 3: must be at most 2, the number of training images"),
        (linear_probe, {"labelled_images": 2}, "labelled_images = 2: must be enough for two images of each class"),
        (probe_blocks, {"labelled_images": 2}, "labelled_images = 2: must be enough for two images of each class"),
        (linear_probe, {"labelled_images": 3}, "labelled_images = 3: must be 0 (all) or a multiple of the 2 classes"),
    ],
)
def test_too_few_images(tmp_path, packed_folder, run, changes, message):
    with pytest.raises(ValueError) as error:
        run(probe_settings(packed_folder, tmp_path / "out", **changes))
    assert message in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ({"splits": ("train",)}, "must be a set with validation images"),
        ({"classes": ("one",)}, "must be a set with two classes or more"),
    ],
)
def test_unfit_data(tmp_path, folders, message):
    write_images(tmp_path / "images", **folders)
    packed = str(tmp_path / "packed")
    pack(DataSettings(data="folder", path=str(tmp_path / "images"), size=16, channels=3, out=packed))
    for run in (knn, linear_probe, probe_blocks):
        with pytest.raises(ValueError, match=message):
            run(probe_settings(packed, tmp_path / "out"))


def test_a_checkpoint_that_does_not_fit(tmp_path, packed_folder):
    deep = save_encoder(tmp_path / "deep.safetensors")
    with pytest.raises(ValueError, match="block = 7: must be from 1 to 2"):
        knn(probe_settings(packed_folder, tmp_path / "out", checkpoint=deep, block=7))
    grey = save_encoder(tmp_path / "grey.safetensors", in_chans=1)
    with pytest.raises(ValueError, match="must be of the checkpoint's channel count"):
        linear_probe(probe_settings(packed_folder, tmp_path / "out", checkpoint=grey))
