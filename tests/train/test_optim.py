import pytest
import torch

from conftest import TINY
from simmimlib.model.encoders import create_encoder
from simmimlib.train.optim import create_optimizer, layer_id, parameter_groups
from simmimlib.train.settings import PretrainSettings
from simmimlib.weights.export import export_timm
from small_runs import METHODS


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
    names = ("pos_embed", "cls_token", "blocks.0.x", "blocks.11.x", "fc_norm.x", "head.x")
    assert [layer_id(name, [12]) for name in names] == [0, 0, 1, 12, 13, 13]


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


def test_the_optimiser_is_the_papers():
    optimizer = create_optimizer([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1.0}])
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["betas"] == (0.9, 0.999) and optimizer.defaults["eps"] == 1e-8


def test_layer_ids_of_a_convnext():
    """The official "single" rule: what downsamples belongs to the block above it."""
    names = (
        "stem.0.x",
        "stages.0.blocks.0.x",
        "stages.1.downsample.1.x",
        "stages.2.blocks.1.x",
        "head.norm.x",
        "head.fc.x",
    )
    assert [layer_id(name, [1, 1, 2, 1]) for name in names] == [1, 1, 2, 4, 6, 6]


@pytest.mark.parametrize("method", ["mae", "fcmae"])
def test_decay_in_the_pretraining_of_the_others(method):
    """Class and mask tokens are decayed, one-dimensional parameters are not, fixed positions are in no group."""
    small = METHODS[method] | {"image_size": 16, "mask_patch_size": 8 if method == "fcmae" else 4}
    settings = PretrainSettings(**({"encoder_kwargs": TINY} | small))
    model = settings.model()
    groups = by_name(model, parameter_groups(model, 1.0, 0.05, pretraining=True))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(groups) == trained and "encoder.model.pos_embed" not in trained
    for name in trained:
        decayed = model.get_parameter(name).ndim > 1
        assert bool(groups[name]["weight_decay"]) == decayed, name


def test_the_second_beta_is_a_setting():
    optimizer = create_optimizer([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1.0}], beta2=0.95)
    assert optimizer.defaults["betas"] == (0.9, 0.95)
