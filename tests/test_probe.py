import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from conftest import TINY, write_images
from simmimlib import probe
from simmimlib.batches import validation_batches
from simmimlib.checkpoints import export_timm, save_simmim
from simmimlib.data import open_packed
from simmimlib.encoders import create_encoder
from simmimlib.packing import pack
from simmimlib.probe import ProbeSettings, cut_after, extract, fit_linear, knn, linear_probe, mean_tokens, weighted_vote
from simmimlib.simmim import SimMIM
from simmimlib.sources import DataSettings

SWIN = {"embed_dim": 16, "depths": (1, 2, 1), "num_heads": (1, 2, 2), "window_size": 4}
BEIT = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
ENCODERS = {  # all with inputs of 32 pixels
    "vit_tiny_patch16_224": {**TINY, "depth": 3},
    "deit_tiny_distilled_patch16_224": {**TINY, "depth": 3},
    "simmim_vit_base": BEIT,
    "swin_tiny_patch4_window7_224": SWIN,
    "swinv2_tiny_window8_256": SWIN,
}


def settings(packed, out, **changes):
    values = {"data": packed, "encoder_kwargs": TINY, "image_size": 16, "k": 3, "batch_size": 5, "out": str(out)}
    return ProbeSettings(**values | changes)


def save_encoder(path, in_chans=3, **kwargs) -> str:
    torch.manual_seed(0)
    save_simmim(path, SimMIM(create_encoder("vit_tiny_patch16_224", 16, in_chans, **{**TINY, **kwargs})))
    return str(path)


def blocks_of(model):
    return [block for stage in getattr(model, "layers", [model]) for block in stage.blocks]


# Features -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODERS)
@torch.inference_mode()
def test_each_block_gives_the_mean_of_its_patch_tokens(name):
    torch.manual_seed(0)
    encoder = create_encoder(name, 32, **ENCODERS[name]).eval()
    images, outputs = torch.randn(2, 3, 32, 32), []
    for block in blocks_of(encoder.model):
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    last = encoder(images)  # [B, D, h, w]
    depth, prefix = len(outputs), getattr(encoder.model, "num_prefix_tokens", 0)
    assert depth == {"swin": 4, "swinv2": 4}.get(name.partition("_")[0], 3)
    expected = [o[:, prefix:].mean(1) if o.ndim == 3 else o.mean((1, 2)) for o in outputs]
    for block, features in enumerate([last.mean((2, 3)), *expected]):
        model = cut_after(export_timm(encoder), block).eval()
        torch.testing.assert_close(mean_tokens(model, images), features, rtol=1e-4, atol=1e-5)
        assert len(blocks_of(model)) == (block or depth), "what follows is not computed"


def test_features_are_of_whole_images_in_order_in_float32(tmp_path, packed_folder):
    data = open_packed(packed_folder)
    model = settings(packed_folder, tmp_path).model(3)
    images = torch.from_numpy(np.array(data.val.images)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (data.mean, data.std))
    batches = validation_batches(data.val, data, 16, 5, torch.device("cpu"))
    with torch.no_grad():
        expected = mean_tokens(model, (images - mean) / std)
    torch.testing.assert_close(extract(model, batches, torch.float32), expected)
    rough = extract(model, batches, torch.bfloat16)
    assert rough.dtype == torch.float32 and not rough.equal(expected)
    torch.testing.assert_close(rough, expected, rtol=0.1, atol=0.1)


def test_nothing_is_trained(tmp_path, packed_folder):
    checkpoint = save_encoder(tmp_path / "model.safetensors", drop_path_rate=0.5)
    before = Path(checkpoint).read_bytes()
    changes = settings(packed_folder, tmp_path / "out", checkpoint=checkpoint)
    first, again = knn(changes), knn(changes)
    assert first["top1"] == again["top1"] and Path(checkpoint).read_bytes() == before
    data, model = open_packed(packed_folder), changes.model(3)
    batches = validation_batches(data.val, data, 16, 5, torch.device("cpu"))
    features = [extract(model, batches, torch.float32) for _ in range(2)]
    assert features[0].equal(features[1]) and not any(module.training for module in model.modules())
    assert not any(feature.requires_grad for feature in features)


# Classifiers --------------------------------------------------------------------------------------------------------


def test_the_vote_is_that_of_scikit_learn(monkeypatch, generator):
    monkeypatch.setattr(probe, "SIMILARITIES", 1000)  # queries in parts
    train, queries = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (200, 43))
    labels = torch.randint(7, (200,), generator=generator)
    for k, temperature in ((1, 0.07), (20, 0.07), (20, 5.0), (200, 0.5)):
        reference = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda d, t=temperature: np.exp((1 - d) / t)
        ).fit(train, labels)
        assert weighted_vote(train, labels, queries, k, temperature).tolist() == reference.predict(queries).tolist()
    low = weighted_vote(train.float(), labels, queries.float(), 20, 1e-3)  # exp(1 / 0.001) is no float32
    assert low.equal(weighted_vote(train, labels, queries, 1, 1.0))


def test_the_regularisation_is_chosen_on_held_out_training_images():
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(300, 100)) * 10.0 ** rng.integers(-3, 4, 100)).astype(np.float32)
    features[:, 0] = rng.normal(size=300)
    labels = (features[:, 0] + rng.normal(size=300) > 0).astype(int)
    classifier, strength = fit_linear(features, labels, seed=0)
    assert strength < 1, "100 numbers, one of them of use: much regularisation"
    assert fit_linear(features, labels, seed=0)[1] == strength
    steps = classifier.named_steps
    np.testing.assert_allclose(steps["standardscaler"].mean_, features.mean(0), rtol=1e-3, atol=1e-3)  # of all of them
    few = fit_linear(features[[0, 1, 2, 3]], np.array([0, 1, 0, 1]), seed=0)[0]
    assert set(few.classes_) == {0, 1}


@pytest.mark.parametrize("source", ["checkpoint", "untrained"])
def test_dark_and_light(tmp_path, packed_folder, source):
    checkpoint = save_encoder(tmp_path / "model.safetensors") if source == "checkpoint" else ""
    for run, block, own in ((knn, 0, {"k", "temperature"}), (linear_probe, 1, {"C"})):
        metrics = run(settings(packed_folder, tmp_path / "out", checkpoint=checkpoint, block=block, labels=8))
        assert metrics["top1"] == 100 and metrics["labels"] == 8
        assert metrics["features"] == 32 and metrics["block"] == block and metrics["data"] == "folder"
        assert {"seed", "device", "precision", "commit", "wall_seconds", *own} < metrics.keys()
        assert metrics == json.loads((tmp_path / f"out/{run.__name__}.json").read_text())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["knn.json", "linear_probe.json"]


def test_an_encoder_at_another_resolution(tmp_path):
    write_images(tmp_path / "images", size=(32, 32))
    pack(DataSettings(data="folder", path=str(tmp_path / "images"), size=32, channels=3, out=str(tmp_path / "packed")))
    checkpoint = save_encoder(tmp_path / "model.safetensors")
    assert knn(settings(str(tmp_path / "packed"), tmp_path, checkpoint=checkpoint, image_size=32))["top1"] == 100


# Several processes ----------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("run", "batch_size"), [(knn, 5), (linear_probe, 1)])
def test_two_processes_as_one(tmp_path, similar_folder, monkeypatch, run, batch_size):
    """Batches of 5 leave one image to the last; of batches of 1 the second process has no share at all."""
    monkeypatch.chdir(tmp_path)
    one = run(settings(similar_folder, tmp_path / "one", batch_size=16))
    monkeypatch.setenv("SIMMIM_PROCESSES", "2")
    two = run(settings(similar_folder, tmp_path / "two", batch_size=batch_size))
    assert 50 < one["top1"] < 100
    assert one.keys() == two.keys()
    assert all(one[name] == two[name] for name in one.keys() - {"device", "commit", "wall_seconds"})
    assert two == json.loads((tmp_path / f"two/{run.__name__}.json").read_text())


# Messages -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"checkpoint": "none.safetensors"}, "checkpoint = 'none.safetensors': there is no such file"),
        ({"block": 3}, "block = 3: must be from 1 to 2, the encoder's blocks, or 0 for its own output"),
        ({"block": -1}, "block = -1: must be 0 or more"),
        ({"k": 0}, "k = 0: must be above 0"),
        ({"temperature": 0.0}, "temperature = 0.0: must be above 0"),
        ({"val_crop": 1.5}, "val_crop = 1.5: must be above 0 and at most 1"),
        ({"interpolation": "nearest"}, "interpolation = 'nearest': must be one of bilinear, bicubic"),
        ({"pool": "token"}, "unknown parameter 'pool'"),
        ({"encoder": "resnet18"}, "this family cannot take mask tokens"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(ValueError) as error:
        ProbeSettings.from_values(values)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("run", "changes", "message"),
    [
        (knn, {"k": 17}, "k = 17: must be at most 16, the number of training images"),
        (knn, {"k": 3, "labels": 2}, "k = 3: must be at most 2, the number of training images"),
        (linear_probe, {"labels": 2}, "labels = 2: must be enough for two images of each class or more"),
        (linear_probe, {"labels": 3}, "labels = 3: must be 0 (all) or a multiple of the 2 classes"),
    ],
)
def test_too_few_images(tmp_path, packed_folder, run, changes, message):
    with pytest.raises(ValueError) as error:
        run(settings(packed_folder, tmp_path / "out", **changes))
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
    for run in (knn, linear_probe):
        with pytest.raises(ValueError, match=message):
            run(settings(packed, tmp_path / "out"))


def test_a_checkpoint_that_does_not_fit(tmp_path, packed_folder):
    deep = save_encoder(tmp_path / "deep.safetensors")
    with pytest.raises(ValueError, match="block = 7: must be from 1 to 2"):
        knn(settings(packed_folder, tmp_path / "out", checkpoint=deep, block=7))
    grey = save_encoder(tmp_path / "grey.safetensors", in_chans=1)
    with pytest.raises(ValueError, match="must be of the checkpoint's channel count"):
        linear_probe(settings(packed_folder, tmp_path / "out", checkpoint=grey))
