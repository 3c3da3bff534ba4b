import copy
import json
import math

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from simmimlib.data.batches import validation_batches
from simmimlib.data.packed import open_packed
from simmimlib.train import pretrain as pretraining
from simmimlib.train.pretrain import pretrain, reconstruct, validation_loss
from simmimlib.train.resume import read
from simmimlib.weights.checkpoints import load_model
from small_runs import METHODS, crashed, pretrain_settings


@pytest.mark.parametrize("changes", [*METHODS.values(), {"loss": "l2"}, {"loss": "smooth_l1", "scope": "all"}])
def test_pretraining_learns(tmp_path, packed_folder, changes):
    metrics = pretrain(pretrain_settings(packed_folder, tmp_path / "run", **changes))
    log = pd.read_csv(tmp_path / "run/log.csv")
    assert len(log) == 15 and log["loss"].iloc[-1] < 0.7 * log["loss"].iloc[0]
    assert json.loads((tmp_path / "run/metrics.json").read_text()) == metrics
    assert metrics["images_seen"] == 15 * 16 and metrics["loss"] == pytest.approx(log["loss"].iloc[-1])
    files = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert files == ["log.csv", "metrics.json", "model.safetensors"]


def test_no_epochs_save_the_untrained_weights(tmp_path, packed_folder):
    """From scratch is an arm like any other: fine-tuning starts from a file in both cases."""
    metrics = pretrain(pretrain_settings(packed_folder, tmp_path / "run", epochs=0))
    assert (tmp_path / "run/log.csv").read_text() == "epoch,loss,grad_norm,lr,skipped\n"
    assert json.loads((tmp_path / "run/metrics.json").read_text()) == metrics
    assert metrics["loss"] is None and metrics["images_per_second"] is None and metrics["images_seen"] == 0
    assert math.isfinite(metrics["val_loss"]), "what training has to beat"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "log.csv",
        "metrics.json",
        "model.safetensors",
    ]
    assert not list((tmp_path / ".scratch/runs").iterdir())


def test_the_untrained_weights_are_those_that_training_starts_with(tmp_path, packed_folder, monkeypatch):
    def start(seed):
        pretrain(pretrain_settings(packed_folder, tmp_path / f"scratch{seed}", epochs=0, seed=seed))
        return load_file(tmp_path / f"scratch{seed}/model.safetensors")

    (first,) = crashed(monkeypatch, pretrain_settings(packed_folder, tmp_path / "run", seed=1), 0)
    (tmp_path / "state").write_bytes(read(first))
    state = torch.load(tmp_path / "state", weights_only=True)["model"]
    untrained, other = start(1), start(2)
    assert state.keys() == untrained.keys() and all(state[name].equal(untrained[name]) for name in state)
    assert not untrained["encoder.model.blocks.0.attn.qkv.weight"].equal(
        other["encoder.model.blocks.0.attn.qkv.weight"]
    )


def test_the_initial_weights_of_an_encoder_do_not_depend_on_the_head(tmp_path, packed_folder):
    """So that arms of one seed differ in nothing but their change."""
    weights = []
    for name, changes in (("a", {}), ("b", {"head": "mlp", "scope": "all", "target": "bins_8"})):
        pretrain(pretrain_settings(packed_folder, tmp_path / name, epochs=0, **changes))
        weights.append(load_model(tmp_path / name / "model.safetensors").encoder.state_dict())
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


def test_colour_clusters_are_fitted_on_training_images_whatever_the_seed(tmp_path, packed_folder):
    """Dark images and light ones, no pixel in between: so are the clusters."""
    colours = []
    for seed in (0, 1):
        settings = pretrain_settings(packed_folder, tmp_path / "run", epochs=0, target="clusters_512", seed=seed)
        pretrain(settings)
        colours.append(load_model(tmp_path / "run/model.safetensors").target.colours)
    assert colours[0].equal(colours[1]) and len(colours[0].unique(dim=0)) == 512
    data = open_packed(packed_folder)
    mean, std = (torch.tensor(value) for value in (data.mean, data.std))
    grey = ((colours[0] * std + mean) * 255).mean(1)
    assert 0 < grey.min() < 100 and 140 < grey.max() < 240
    assert not ((grey > 100) & (grey < 140)).any()


def test_the_validation_loss_is_taken_in_evaluation_mode(tmp_path, packed_folder):
    """The mean over the images, not over the batches: the last of three holds one image."""
    settings = pretrain_settings(packed_folder, tmp_path, drop_path=0.9, batch_size=5)
    data = open_packed(packed_folder)
    torch.manual_seed(0)
    model, masks = settings.model(3, data.mean, data.std), settings.masks(4)
    whole = pretrain_settings(packed_folder, tmp_path, batch_size=1)
    expected = validation_loss(copy.deepcopy(model).eval(), masks, data, settings, torch.float32)
    assert validation_loss(model.train(), masks, data, settings, torch.float32) == expected
    assert validation_loss(model.train(), masks, data, settings, torch.float32) == expected, "the same masks each time"
    assert not any(parameter.grad is not None for parameter in model.parameters())
    one = [
        validation_loss(model, masks, data_of(data, slice(i, i + 1)), whole, torch.float32)
        for i in range(len(data.val))
    ]
    assert expected == pytest.approx(sum(one) / len(one), rel=0.1), "masks differ, so that this is near and not equal"


def data_of(data, rows):
    part = copy.copy(data)
    part.val = data.val.select(rows)
    return part


def test_reconstructions_are_in_evaluation_mode(tmp_path, packed_folder):
    settings = pretrain_settings(packed_folder, tmp_path, drop_path=0.9)
    torch.manual_seed(0)
    model = settings.model()
    images, mask = torch.randn(2, 3, 16, 16), settings.masks(4)(2, torch.Generator().manual_seed(0))
    expected = copy.deepcopy(model).eval()(images, mask).prediction
    found = reconstruct(model.train(), images, mask)
    torch.testing.assert_close(found, expected.detach())
    assert not found.requires_grad


def test_the_validation_loss_is_of_all_classes(tmp_path, packed_folder, monkeypatch):
    """Folders of images are in the order of their classes: the first thousand of a large one are of one class."""
    monkeypatch.setattr(pretraining, "VALIDATION_IMAGES", 4)
    seen = []
    monkeypatch.setattr(
        pretraining, "validation_batches", lambda split, *a: seen.append(split) or validation_batches(split, *a)
    )
    pretrain(pretrain_settings(packed_folder, tmp_path / "run", epochs=1))
    assert sorted(seen[0].labels) == [0, 0, 1, 1]
