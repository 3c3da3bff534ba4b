import copy

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from conftest import write_images
from simmimlib.data.batches import validation_batches
from simmimlib.data.packed import open_packed
from simmimlib.data.packing import pack
from simmimlib.data.sources import DataSettings
from simmimlib.train import probe
from simmimlib.train.finetune import classifier, evaluate, finetune, recipe
from simmimlib.train.pretrain import pretrain
from small_runs import finetune_settings, pretrain_settings, probe_settings, watch_steps

CPU = torch.device("cpu")


def test_finetuning_learns_from_a_checkpoint(tmp_path, packed_folder):
    pretrain(pretrain_settings(packed_folder, tmp_path / "pre", epochs=2))
    checkpoint = str(tmp_path / "pre/model.safetensors")
    metrics = finetune(finetune_settings(packed_folder, tmp_path / "fine", checkpoint=checkpoint, layer_decay=0.9))
    assert metrics["top1"] == 100 and metrics["labelled_images"] == 16
    confusion = pd.read_csv(tmp_path / "fine/confusion.csv")
    assert list(confusion) == ["dark", "light"] and (np.diag(confusion) == 8).all()


def test_finetuning_from_scratch_with_everything_on(tmp_path, packed_folder):
    options = {"mixup": 0.8, "cutmix": 1.0, "random_erasing": 0.25, "auto_augment": "rand-m9-mstd0.5-inc1"}
    options |= {"flip": True, "interpolation": "bicubic", "drop_path": 0.1, "crop_pct": 0.875}
    metrics = finetune(finetune_settings(packed_folder, tmp_path / "fine", epochs=3, eval_epochs=2, **options))
    log = pd.read_csv(tmp_path / "fine/log.csv")
    assert np.isfinite(log["loss"]).all() and log["top1"].notna().tolist() == [False, True, True]
    assert 0 <= metrics["top1"] <= metrics["top1_best"] <= 100
    assert metrics["top1"] == log["top1"].iloc[-1] and metrics["top1_best"] == log["top1"].max()
    assert metrics["validated"] == 2


def test_finetuning_at_another_resolution(tmp_path):
    root = write_images(tmp_path / "images", size=(32, 32))
    packed = str(tmp_path / "packed32")
    pack(DataSettings(data="folder", path=str(root), size=32, channels=3, out=packed))
    pretrain(pretrain_settings(packed, tmp_path / "pre", epochs=1, image_size=16))
    checkpoint = str(tmp_path / "pre/model.safetensors")
    metrics = finetune(finetune_settings(packed, tmp_path / "f", checkpoint=checkpoint, image_size=32, epochs=2))
    assert metrics["top1"] >= 0


def test_finetuning_needs_labelled_validation_images(tmp_path):
    write_images(tmp_path / "flat", splits=(".",), classes=(".",))
    packed = str(tmp_path / "packed")
    pack(DataSettings(data="folder", path=str(tmp_path / "flat"), size=16, channels=3, out=packed))
    assert pretrain(pretrain_settings(packed, tmp_path / "pre", epochs=1))["val_loss"] is None
    with pytest.raises(ValueError, match="must be a set with validation images"):
        finetune(finetune_settings(packed, tmp_path / "fine"))


# What runs of one seed share ------------------------------------------------------------------------------------------


def seen_in_training(monkeypatch, settings):
    """Weights before the first step, and every step's images and labels."""
    weights, steps = {}, []

    def look(run, inputs):
        if not weights:
            weights.update(copy.deepcopy(run.model.state_dict()))
        steps.append(inputs)

    with monkeypatch.context() as patch:
        watch_steps(patch, look)
        finetune(settings)
    return weights, steps


@pytest.fixture
def checkpoints(tmp_path, packed_folder):
    """The arm `scratch`, and a pre-trained encoder."""
    for name, epochs in (("scratch", 0), ("default", 3)):
        pretrain(pretrain_settings(packed_folder, tmp_path / name, epochs=epochs))
    return {name: str(tmp_path / name / "model.safetensors") for name in ("scratch", "default")}


def test_scratch_and_pretrained_differ_in_the_encoder_alone(tmp_path, packed_folder, monkeypatch, checkpoints):
    """Classifier, labelled images, their order and their crops are the same: the arms are paired by the seed."""
    changes = {"labelled_images": 8, "epochs": 2, "batch_size": 4, "crop_scale": 0.5, "flip": True}
    (one, one_steps), (two, two_steps), (other, other_steps) = (
        seen_in_training(
            monkeypatch,
            finetune_settings(packed_folder, tmp_path / "fine", checkpoint=checkpoints[arm], seed=seed, **changes),
        )
        for arm, seed in (("scratch", 0), ("default", 0), ("scratch", 1))
    )
    same = {name for name in one if one[name].equal(two[name])}
    assert {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"} <= same
    assert one["head.weight"].any(), "not zeros, which would be equal anyway"
    assert {name for name in one if name.startswith(("blocks", "patch_embed"))}.isdisjoint(same)
    assert len(one_steps) == len(two_steps) == 4
    for (images, labels), (others, other_labels) in zip(one_steps, two_steps, strict=True):
        assert images.equal(others) and labels.equal(other_labels)

    assert not one["head.weight"].equal(other["head.weight"])
    assert any(not a[0].equal(b[0]) for a, b in zip(one_steps, other_steps, strict=True))


def test_the_classifier_does_not_depend_on_what_was_built_before_it(tmp_path, packed_folder, checkpoints):
    """Another head draws other initial weights when the checkpoint is read, and from scratch there is none."""
    pretrain(pretrain_settings(packed_folder, tmp_path / "mlp", epochs=0, head="mlp"))
    starts = [checkpoints["default"], str(tmp_path / "mlp/model.safetensors"), ""]
    heads = [
        classifier(finetune_settings(packed_folder, tmp_path, checkpoint=start), 3, 2, CPU).head.weight
        for start in starts
    ]
    assert heads[0].any() and heads[0].equal(heads[1]) and heads[0].equal(heads[2])


def test_the_labelled_images_follow_from_the_seed(tmp_path, packed_folder, monkeypatch):
    """And a probe takes those that fine-tuning takes."""

    def used(seed):
        """Without crops a step's images are those of the set."""
        changes = {"labelled_images": 4, "batch_size": 4, "epochs": 2, "seed": seed}
        _, steps = seen_in_training(monkeypatch, finetune_settings(packed_folder, tmp_path / "fine", **changes))
        sets = [{tuple(image.flatten().tolist()) for image in images} for images, _ in steps]
        assert sets[0] == sets[1] and len(sets[0]) == 4
        return sets[0]

    first, second = used(0), used(1)
    assert first != second
    for seed, images in ((0, first), (1, second)):
        settings = probe_settings(packed_folder, tmp_path / "probe", labelled_images=4, seed=seed, raw_pixels=True)
        with monkeypatch.context() as patch:
            fitted = []
            fit = probe.fit_linear
            patch.setattr(probe, "fit_linear", lambda *a, fitted=fitted, fit=fit: fitted.append(a[0]) or fit(*a))
            probe.probe_blocks(settings)
        assert {tuple(row.tolist()) for row in fitted[0]} == images, "the first of them are the raw pixels"


def test_the_best_top1_is_that_of_the_best_validated_epoch(tmp_path, packed_folder, monkeypatch):
    confusions = iter([torch.tensor([[8, 0], [1, 7]]), torch.tensor([[8, 0], [4, 4]])])
    monkeypatch.setattr("simmimlib.train.finetune.evaluate", lambda *arguments: next(confusions))
    metrics = finetune(finetune_settings(packed_folder, tmp_path / "fine", epochs=4, eval_epochs=2))
    assert (metrics["top1"], metrics["top1_best"], metrics["validated"]) == (75, 93.75, 2)
    log = pd.read_csv(tmp_path / "fine/log.csv")
    assert log["top1"].dropna().tolist() == [93.75, 75] and log["epoch"][log["top1"].notna()].tolist() == [2, 4]
    confusion = pd.read_csv(tmp_path / "fine/confusion.csv")
    assert confusion.values.tolist() == [[8, 0], [4, 4]], "the last one's"


def test_the_classifier_gets_the_weights_of_the_checkpoint(tmp_path, packed_folder, checkpoints):
    for name, checkpoint in checkpoints.items():
        model = classifier(finetune_settings(packed_folder, tmp_path, checkpoint=checkpoint), 3, 2, CPU)
        saved = load_file(checkpoint)
        for key, tensor in model.state_dict().items():
            if not key.startswith(("head", "fc_norm")):
                assert tensor.equal(saved[f"encoder.model.{key}"]), (name, key)


def test_a_checkpoint_of_other_channels(tmp_path, packed_folder, checkpoints):
    settings = finetune_settings(packed_folder, tmp_path, checkpoint=checkpoints["default"])
    with pytest.raises(ValueError, match="must be of the checkpoint's channel count"):
        classifier(settings, 1, 2, CPU)


# Parts ----------------------------------------------------------------------------------------------------------------


def test_evaluation_is_in_evaluation_mode(tmp_path, packed_folder):
    """Dropout and drop path of a model that was just trained are off, and nothing of it changes."""
    settings = finetune_settings(packed_folder, tmp_path, drop_path=0.9)
    settings.encoder_kwargs = {**settings.encoder_kwargs, "drop_rate": 0.9, "proj_drop_rate": 0.9}
    data, classes = open_packed(packed_folder), 10
    model = classifier(settings, 3, classes, CPU)
    torch.nn.init.normal_(model.head.weight)  # an untrained one would hardly tell images apart
    batches = validation_batches(data.val, data, 16, 5, CPU)
    plain, expected = copy.deepcopy(model).eval(), torch.zeros(classes, classes, dtype=torch.long)
    with torch.no_grad():
        for images, labels in batches:
            for label, predicted in zip(labels, plain(images).argmax(1), strict=True):
                expected[label, predicted] += 1
    for _ in range(3):
        found = evaluate(model.train(), batches, classes, torch.float32)
        assert found.equal(expected), "row: true class, column: predicted"
    assert found.sum() == 16 and found.dtype == torch.long


def test_label_smoothing_is_torchs(tmp_path, packed_folder, generator):
    for smoothing in (0.0, 0.1):
        loss, augment = recipe(finetune_settings(packed_folder, tmp_path, smoothing=smoothing), 5, CPU)
        logits, labels = torch.randn(8, 5, generator=generator), torch.randint(5, (8,), generator=generator)
        expected = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        torch.testing.assert_close(loss(torch.nn.Identity(), logits, labels), expected)
        images = torch.randn(8, 3, 16, 16, generator=generator)
        same = augment(images.clone(), labels)
        assert same[0].equal(images) and same[1].equal(labels), "without mixup and erasing a batch stays as it is"


@pytest.mark.parametrize("option", ["mixup", "cutmix"])
def test_mixed_labels_follow_the_mixed_images(tmp_path, packed_folder, option):
    """Image i is all i: how much of another image is in it can be read off its mean."""
    loss, augment = recipe(finetune_settings(packed_folder, tmp_path, **{option: 1.0}, smoothing=0.0), 8, CPU)
    np.random.seed(0)  # noqa: NPY002 timm draws from it
    images = torch.eye(8).view(8, 8, 1, 1).repeat(1, 1, 16, 16)
    mixed, labels = augment(images.clone(), torch.arange(8))
    torch.testing.assert_close(mixed.mean((2, 3)), labels, atol=0.01, rtol=0)
    torch.testing.assert_close(labels.sum(1), torch.ones(8))
    assert (labels.max(1).values < 1).all(), "every image is mixed"
    logits = torch.randn(8, 8)
    expected = F.cross_entropy(logits, labels)  # with probabilities
    torch.testing.assert_close(loss(torch.nn.Identity(), logits, labels), expected)


def test_random_erasing_erases_with_its_probability(tmp_path, packed_folder):
    images, labels = torch.zeros(200, 3, 16, 16), torch.zeros(200)
    for probability in (0.0, 0.25, 1.0):
        _, augment = recipe(finetune_settings(packed_folder, tmp_path, random_erasing=probability), 5, CPU)
        torch.manual_seed(0)
        changed = augment(images.clone(), labels)[0].flatten(1).any(1).float().mean()
        assert changed == pytest.approx(probability, abs=0.1 if 0 < probability < 1 else 0)
