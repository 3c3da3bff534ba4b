"""The official recipes, and every arm of the ablations."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from conftest import ROOT, write_images
from simmimlib.data.packing import pack
from simmimlib.data.sources import DataSettings
from simmimlib.pipeline.arms import arms_of, stage_parameters
from simmimlib.pipeline.dry_run import dry_run
from simmimlib.pipeline.profiles import load_profile
from simmimlib.train.optim import create_optimizer, create_schedule, scale_rate
from simmimlib.train.pretrain import pretrain
from simmimlib.train.settings import FinetuneSettings, PretrainSettings
from simmimlib.weights.checkpoints import load_model

QUESTIONS = yaml.safe_load((ROOT / "arms.yaml").read_text())["questions"]
ARMS = {  # and what each changes in pre-training
    name: arm.get("pretrain", {}) for question in QUESTIONS.values() for name, arm in question.get("arms", {}).items()
}


@pytest.fixture(autouse=True)
def project(own_folder, tmp_path):
    """The test's own folder is a project, with the arms and profiles of this one."""
    for name in ("arms.yaml", "dvc.yaml", "profiles"):
        (tmp_path / name).symlink_to(ROOT / name)


def settings_of(profile, stage):
    values = stage_parameters(load_profile(profile), stage, "default", 0)
    if stage == "pretrain":
        return PretrainSettings.from_values(values)
    return FinetuneSettings.from_values(values | {"checkpoint": ""})  # there is none yet


def rates(settings, steps_per_epoch=10):
    """The rate of a parameter on top of the model, at every step."""
    peak = scale_rate(settings.base_lr, settings.batch_size)
    optimizer = create_optimizer([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": peak}])
    schedule = create_schedule(optimizer, settings, steps_per_epoch)
    found = []
    for step in range(settings.epochs * steps_per_epoch):
        schedule.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return np.array(found)


def cosine(step, steps, peak, low):
    return low + (peak - low) * (1 + math.cos(math.pi * step / steps)) / 2


def test_ablation_pretraining():
    """Swin-B, 100 epochs: 4e-6 up to 8e-4 over 10 epochs, cosine down to 4e-5; at a batch of 2048."""
    settings = settings_of("imagenet-100ep", "pretrain")
    assert (settings.image_size, settings.mask_patch_size, settings.mask_ratio, settings.drop_path) == (192, 32, 0.6, 0)
    assert (settings.weight_decay, settings.clip_grad, settings.crop_scale, settings.flip) == (0.05, 5, 0.67, True)
    found = rates(settings)
    expected = [
        4e-6 + (8e-4 - 4e-6) * step / 100 if step < 100 else cosine(step, 1000, 8e-4, 4e-5) for step in range(1000)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert found[100] / 8e-4 == pytest.approx(0.976, abs=2e-3)


@pytest.mark.parametrize(("profile", "drop_path"), [("swin-b", 0.0), ("swin-l", 0.0), ("vit-b", 0.1)])
def test_800_epochs_of_pretraining(profile, drop_path):
    """2e-6 up to 4e-4 over 10 epochs, a tenth of it from epoch 700."""
    settings = settings_of(f"imagenet-800ep-{profile}", "pretrain")
    assert settings.drop_path == drop_path
    found = rates(settings)
    expected = [2e-6 + (4e-4 - 2e-6) * s / 100 if s < 100 else 4e-4 if s < 7000 else 4e-5 for s in range(8000)]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("profile", "size", "layer_decay", "drop_path"),
    [
        ("imagenet-100ep", 192, 0.9, 0.1),
        ("imagenet-800ep-swin-b", 224, 0.8, 0.1),
        ("imagenet-800ep-swin-l", 224, 0.7, 0.2),
        ("imagenet-800ep-vit-b", 224, 0.65, 0.1),
    ],
)
def test_fine_tuning(profile, size, layer_decay, drop_path):
    """1e-6 up to 5e-3 over 20 epochs, cosine over 100 epochs down to 1e-6."""
    settings = settings_of(profile, "finetune")
    assert (settings.image_size, settings.layer_decay, settings.drop_path) == (size, layer_decay, drop_path)
    assert (settings.mixup, settings.cutmix, settings.smoothing, settings.random_erasing) == (0.8, 1.0, 0.1, 0.25)
    found = rates(settings)
    expected = [
        1e-6 + (5e-3 - 1e-6) * step / 200 if step < 200 else cosine(step, 1000, 5e-3, 1e-6) for step in range(1000)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("arms")
    write_images(root / "images", count=2, size=(64, 64))
    pack(DataSettings(data="folder", path=str(root / "images"), size=64, channels=3, out=str(root / "packed")))
    return str(root / "packed")


@pytest.mark.parametrize(
    "arm", [pytest.param(arm, marks=pytest.mark.slow if arm == "head_inverse_swin_b" else ()) for arm in ARMS]
)
def test_every_arm_runs(arm, packed, tmp_path):
    """A step or two of each arm, a Swin of 64 pixels: sizes fit, the loss is a number, the prediction an image."""
    kwargs = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8], "window_size": 2}
    model = {"encoder": "swin_tiny_patch4_window7_224", "encoder_kwargs": kwargs, "image_size": 64}
    if "positions" in ARMS[arm] or ARMS[arm].get("method") == "mae":  # of ViTs
        kwargs = {"embed_dim": 32, "depth": 1, "num_heads": 2}
        model = {"encoder": "vit_tiny_patch16_224", "encoder_kwargs": kwargs, "image_size": 64}
    convnext = {"encoder": "convnextv2_atto", "encoder_kwargs": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}}
    params = {"profile": "tiny", "model": model, "convnext": convnext}
    params["pretrain"] = {"mask_patch_size": 32, "epochs": 2 if arm.startswith("length") else 1, "batch_size": 4}
    values = stage_parameters(params, "pretrain", arm, 0)
    settings = PretrainSettings.from_values(values | {"data": packed, "out": str(tmp_path / "run")})
    metrics = pretrain(settings)
    assert metrics["loss"] is None if ARMS[arm].get("epochs") == 0 else math.isfinite(metrics["loss"])
    assert math.isfinite(metrics["val_loss"]) and metrics["avg_dist"] > 0
    model = load_model(tmp_path / "run/model.safetensors").eval()
    images = torch.randn(1, 3, 64, 64)
    masks = settings.masks(model.encoder.patch_size)
    prediction = model(images, masks(1, torch.Generator().manual_seed(0))).prediction
    assert prediction.shape == images.shape and prediction.isfinite().all()


@pytest.mark.parametrize("profile", ["quick", "cifar10-cpu", "cifar10", "imagenette", "imagenet-100ep"])
def test_no_two_arms_of_a_profile_train_the_same(profile):
    """A ratio is a number of mask patches: of four, 10 % and 20 % are both one."""
    params, seen = load_profile(profile), {}
    for arm in dict.fromkeys(arm for name in params["arms"] for arm in arms_of(name)):
        settings = PretrainSettings.from_values(stage_parameters(params, "pretrain", arm, 0))
        finetune = stage_parameters(params, "finetune", arm, 0) | {"checkpoint": "", "out": ""}
        masks = settings.masks(settings.mask_patch_size)
        trained = repr((replace(settings, mask_ratio=masks.count / math.prod(masks.grid), out=""), finetune))
        assert trained not in seen, f"{arm} = {seen[trained]}"
        seen[trained] = arm


@pytest.mark.slow
def test_the_papers_recipe_starts(capsys, tmp_path):
    """Swin-B at full size: two steps of pre-training and two of fine-tuning with RandAugment, mixup and all."""
    dry_run("imagenet-100ep")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("imagenet-100ep")]
    assert [line.split(":")[0] for line in lines] == ["imagenet-100ep pretrain", "imagenet-100ep finetune"]
    assert all(math.isfinite(float(line.split("loss ")[1].split(",")[0])) for line in lines)
    assert not list((tmp_path / ".scratch/dry-run").iterdir())
