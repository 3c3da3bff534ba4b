"""The official recipes, and every arm of the ablations."""

import math

import numpy as np
import pytest
import torch
import yaml

from conftest import ROOT, write_images
from simmimlib.checkpoints import export_timm, load_simmim
from simmimlib.encoders import create_encoder
from simmimlib.finetune import FinetuneSettings
from simmimlib.optim import create_optimizer, create_schedule, parameter_groups, scale_rate
from simmimlib.packing import pack
from simmimlib.pretrain import PretrainSettings, pretrain
from simmimlib.settings import stage_parameters
from simmimlib.sources import DataSettings
from simmimlib.stages import dry_run

ARMS = sorted(path.stem for path in (ROOT / "arms").glob("*.yaml") if path.stem != "scratch")


@pytest.fixture(autouse=True)
def in_project(monkeypatch):
    monkeypatch.chdir(ROOT)


def settings_of(profile, stage):
    params = yaml.safe_load((ROOT / f"profiles/{profile}.yaml").read_text())
    values = stage_parameters(stage, params, "scratch", 0)[1]
    return {"pretrain": PretrainSettings, "finetune": FinetuneSettings}[stage].from_values(values)


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
    assert (settings.weight_decay, settings.clip_norm, settings.crop_scale, settings.flip) == (0.05, 5, 0.67, True)
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
    assert (settings.mixup, settings.cutmix, settings.smoothing, settings.erase) == (0.8, 1.0, 0.1, 0.25)
    found = rates(settings)
    expected = [
        1e-6 + (5e-3 - 1e-6) * step / 200 if step < 200 else cosine(step, 1000, 5e-3, 1e-6) for step in range(1000)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def by_name(model, groups):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group for group in groups for p in group["params"]}


def test_decay_and_rates_of_the_official_vit():
    """Fine-tuning ViT-B: block i has id i + 1 of 13; matrices and relative bias tables are decayed, tokens are not."""
    encoder = create_encoder("simmim_vit_base", 32, embed_dim=24, num_heads=2)
    model = export_timm(encoder, 10, "avg")
    groups = by_name(model, parameter_groups(model, 1.0, 0.05, layer_decay=0.65))
    assert set(groups) == set(dict(model.named_parameters()))
    for name, parameter in model.named_parameters():
        layer = 0 if name.startswith(("cls_token", "patch_embed")) else 13
        if name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        assert groups[name]["lr"] == pytest.approx(0.65 ** (13 - layer)), name
        assert bool(groups[name]["weight_decay"]) == (parameter.ndim > 1 and name != "cls_token"), name


@pytest.mark.parametrize("name", ["simmim_vit_base", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_decay_in_pretraining(name):
    """The bias tables are decayed; the mask token is in a ViT and is not in a Swin; one rate for all."""
    shape = {"embed_dim": 24, "num_heads": 2} if "vit" in name else {"depths": (1, 1, 1, 1), "embed_dim": 12}
    settings = PretrainSettings(encoder=name, encoder_kwargs=shape, image_size=64, mask_patch_size=32)
    model = settings.model()
    groups = by_name(model, parameter_groups(model, 1.0, 0.05, pretraining=True))
    for full_name, parameter in model.named_parameters():
        exempt = parameter.ndim == 1 or full_name.endswith((".cls_token", ".bias", ".logit_scale"))
        exempt |= "cpb_mlp" in full_name or (full_name.endswith("mask_token") and "swin" in name)
        assert bool(groups[full_name]["weight_decay"]) != exempt, full_name
        assert groups[full_name]["lr"] == 1.0


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("arms")
    write_images(root / "images", count=2, size=(64, 64))
    pack(DataSettings(data="folder", path=str(root / "images"), size=64, channels=3, out=str(root / "packed")))
    return str(root / "packed")


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_runs(arm, packed, tmp_path):
    """One step of each arm with a tiny Swin at 64 pixels: sizes fit, the loss is a number, the prediction an image."""
    kwargs = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8], "window_size": 2}
    model = {"encoder": "swin_tiny_patch4_window7_224", "encoder_kwargs": kwargs, "image_size": 64}
    params = {"profile": "tiny", "model": model}
    params["pretrain"] = {"mask_patch_size": 32, "epochs": 1, "batch_size": 4}
    _, values, _ = stage_parameters("pretrain", params, arm, 0)
    settings = PretrainSettings.from_values(values | {"data": packed, "out": str(tmp_path)})
    metrics = pretrain(settings)
    assert math.isfinite(metrics["loss"]) and metrics["avg_dist"] > 0
    model = load_simmim(tmp_path / "model.safetensors").eval()
    images = torch.randn(1, 3, 64, 64)
    prediction = model(images, settings.masks(4)(1, torch.Generator().manual_seed(0))).prediction
    assert prediction.shape == images.shape and prediction.isfinite().all()


def test_the_papers_recipe_starts(capsys, monkeypatch, tmp_path):
    """Swin-B at full size: two steps of pre-training and two of fine-tuning with RandAugment, mixup and all."""
    monkeypatch.setattr("simmimlib.stages.SCRATCH", tmp_path)
    dry_run("imagenet-100ep")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("imagenet-100ep")]
    assert [line.split(":")[0] for line in lines] == ["imagenet-100ep pretrain", "imagenet-100ep finetune"]
    assert all(math.isfinite(float(line.split("loss ")[1].split(",")[0])) for line in lines)
    assert not list((tmp_path / "dry-run").iterdir())
