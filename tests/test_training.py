import functools
import json

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import TINY, write_images
from simmimlib.checkpoints import export_timm
from simmimlib.encoders import create_encoder
from simmimlib.finetune import FinetuneSettings, finetune
from simmimlib.optim import layer_id, parameter_groups
from simmimlib.packing import pack
from simmimlib.pretrain import PretrainSettings, pretrain
from simmimlib.runtime import compiles
from simmimlib.sources import DataSettings

SMALL_SWIN = {"patch_size": 2, "window_size": 4, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4)}


def pretrain_settings(packed, out, **changes):
    values = {"data": packed, "encoder_kwargs": TINY, "image_size": 16, "mask_patch_size": 4, "epochs": 15}
    values |= {"batch_size": 8, "base_lr": 0.2, "base_warmup_lr": 0.2, "crop_scale": 1.0, "out": str(out)}
    return PretrainSettings(**values | changes)


def finetune_settings(packed, out, **changes):
    values = {"data": packed, "encoder_kwargs": TINY, "image_size": 16, "labels": 0, "epochs": 15, "batch_size": 8}
    values |= {"base_lr": 0.1, "base_warmup_lr": 0.1, "crop_scale": 1.0, "out": str(out)}
    return FinetuneSettings(**values | changes)


@pytest.mark.parametrize("changes", [{}, {"loss": "l2"}, {"loss": "smooth_l1", "scope": "all"}])
def test_pretraining_learns(tmp_path, packed_folder, changes):
    metrics = pretrain(pretrain_settings(packed_folder, tmp_path / "run", **changes))
    log = pd.read_csv(tmp_path / "run/log.csv")
    assert len(log) == 15 and log["loss"].iloc[-1] < 0.7 * log["loss"].iloc[0]
    assert json.loads((tmp_path / "run/metrics.json").read_text()) == metrics
    assert metrics["images_seen"] == 15 * 16
    files = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert files == ["log.csv", "metrics.json", "model.safetensors"]


def test_same_seed_same_numbers(tmp_path, packed_folder):
    first, again, other = (
        pretrain(pretrain_settings(packed_folder, tmp_path / name, epochs=2, seed=seed, crop_scale=0.67, flip=True))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first["loss"] == again["loss"] and first["val_loss"] == again["val_loss"] != other["val_loss"]
    assert (tmp_path / "a/log.csv").read_text() == (tmp_path / "b/log.csv").read_text()


def test_finetuning_learns_from_a_checkpoint(tmp_path, packed_folder):
    pretrain(pretrain_settings(packed_folder, tmp_path / "pre", epochs=2))
    checkpoint = str(tmp_path / "pre/model.safetensors")
    metrics = finetune(finetune_settings(packed_folder, tmp_path / "fine", checkpoint=checkpoint, layer_decay=0.9))
    assert metrics["top1"] == 100 and metrics["labels"] == 16
    confusion = pd.read_csv(tmp_path / "fine/confusion.csv")
    assert list(confusion) == ["dark", "light"] and (np.diag(confusion) == 8).all()


def test_finetuning_from_scratch_with_everything_on(tmp_path, packed_folder):
    options = {"mixup": 0.8, "cutmix": 1.0, "erase": 0.25, "auto_augment": "rand-m9-mstd0.5-inc1", "flip": True}
    options |= {"interpolation": "bicubic", "drop_path": 0.1, "val_crop": 0.875, "epochs": 3, "eval_epochs": 2}
    metrics = finetune(finetune_settings(packed_folder, tmp_path / "fine", **options))
    log = pd.read_csv(tmp_path / "fine/log.csv")
    assert np.isfinite(log["loss"]).all() and log["top1"].notna().tolist() == [False, True, True]
    assert 0 <= metrics["top1"] <= metrics["top1_best"] <= 100


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


@pytest.mark.parametrize(
    ("settings", "values", "message"),
    [
        (PretrainSettings, {"mask_ratio": 0.0}, "mask_ratio = 0.0: must be above 0"),
        (PretrainSettings, {"mask_patch_size": 6}, "image_size = 32: must be a multiple of mask_patch_size = 6"),
        (PretrainSettings, {"loss": "l3"}, "loss = 'l3': must be one of l1, l2, smooth_l1"),
        (PretrainSettings, {"encoder": "resnet18"}, "this family cannot take mask tokens"),
        (PretrainSettings, {"base_lr": "1e-4"}, "base_lr = '1e-4' (str): must be of type float (write 1.0e-4"),
        (PretrainSettings, {"flip": "true"}, "flip = 'true' (str): must be of type bool"),
        (PretrainSettings, {"mask_rato": 0.5}, "unknown parameter 'mask_rato': did you mean 'mask_ratio'?"),
        (FinetuneSettings, {"checkpoint": "none.safetensors"}, "there is no such file (empty = from scratch)"),
        (FinetuneSettings, {"mixup": 0.8, "batch_size": 7}, "batch_size = 7: must be even with mixup or cutmix"),
    ],
)
def test_bad_settings(settings, values, message):
    with pytest.raises(ValueError) as error:
        settings.from_values(values)
    assert message in str(error.value)


def test_rates_of_the_official_fine_tuning_of_swin_b():
    """Layer decay 0.9 over 24 blocks; the downsample of a stage has the rate of the block below it."""
    encoder = create_encoder("swin_base_patch4_window7_224", 192, window_size=6)
    model = export_timm(encoder, 10, "avg")
    groups = parameter_groups(model, 1.0, 0.05, layer_decay=0.9)
    rate = {id(p): g["lr"] for g in groups for p in g["params"]}
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    parameters = dict(model.named_parameters())
    expected = {
        "patch_embed.proj.weight": 0,
        "layers.0.blocks.0.mlp.fc1.weight": 1,
        "layers.0.blocks.1.mlp.fc1.weight": 2,
        "layers.1.downsample.reduction.weight": 2,
        "layers.1.blocks.0.attn.qkv.weight": 3,
        "layers.3.downsample.reduction.weight": 22,
        "layers.3.blocks.1.mlp.fc2.weight": 24,
        "norm.weight": 25,
        "head.fc.weight": 25,
    }
    for name, layer in expected.items():
        assert rate[id(parameters[name])] == pytest.approx(0.9 ** (25 - layer)), name
    for name, parameter in parameters.items():
        exempt = parameter.ndim == 1 or "relative_position_bias_table" in name
        assert decay[id(parameter)] == (0 if exempt else 0.05), name


def test_layer_ids_of_a_vit():
    assert [
        layer_id(n, [12]) for n in ("pos_embed", "cls_token", "blocks.0.x", "blocks.11.x", "fc_norm.x", "head.x")
    ] == [
        0,
        0,
        1,
        12,
        13,
        13,
    ]


@pytest.mark.parametrize("encoder", [{}, {"encoder": "swin_tiny_patch4_window7_224", "encoder_kwargs": SMALL_SWIN}])
def test_a_compiled_step_is_the_same_step(tmp_path, packed_folder, monkeypatch, encoder):
    """The whole step is one graph (`fullgraph`), whatever backend then makes code of it."""
    changes = {"epochs": 3, "drop_path": 0.0, "mask_patch_size": 8} | encoder
    pretrain(pretrain_settings(packed_folder, tmp_path / "plain", **changes))
    monkeypatch.setenv("SIMMIM_COMPILE", "1")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    pretrain(pretrain_settings(packed_folder, tmp_path / "compiled", **changes))
    plain, compiled = (pd.read_csv(tmp_path / name / "log.csv").values for name in ("plain", "compiled"))
    np.testing.assert_allclose(compiled, plain, rtol=1e-4)
    finetune(finetune_settings(packed_folder, tmp_path / "fine", epochs=1, mixup=0.8))


def test_compilation_can_be_decided(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [compiles(cpu, 10**6), compiles(gpu, 10), compiles(gpu, 10**6)] == [False, False, True]
    monkeypatch.setenv("SIMMIM_COMPILE", "0")
    assert not compiles(gpu, 10**6)
    monkeypatch.setenv("SIMMIM_COMPILE", "yes")
    with pytest.raises(ValueError, match="SIMMIM_COMPILE = 'yes': must be one of 0, 1"):
        compiles(gpu, 1)
