import torch

from simmimlib import PretrainSettings
from simmimlib.report.starts import start_of

VIT = {"encoder": "vit_tiny_patch16_224"}


def test_what_a_method_leaves_open_is_its_own():
    usual = PretrainSettings(**VIT)
    assert start_of("model", usual) == "vit_tiny_patch16_224, learned positions, timm's initial weights"
    mae = PretrainSettings(**VIT, method="mae", mask_patch_size=16)
    simmim = PretrainSettings(**VIT, positions="sincos", weight_init="mae")
    assert start_of("model", mae) == start_of("model", simmim)
    assert start_of("model", simmim) == "vit_tiny_patch16_224, fixed positions, MAE's initial weights"


def test_encoders_without_such_positions_and_sections_of_their_own():
    convnext = PretrainSettings(encoder="convnextv2_atto", encoder_kwargs={})
    assert start_of("convnext", convnext) == "convnextv2_atto (convnext), timm's initial weights"


def differing(*recipes):
    """Which tensors of two encoders differ that are built from one seed."""
    built = []
    for recipe in recipes:
        torch.manual_seed(0)
        built.append(dict(recipe.model(1).encoder.named_parameters()))
    return {name for name in built[0] if not torch.equal(*(own[name] for own in built))}


def test_with_timms_weights_one_seed_is_one_encoder():
    usual = PretrainSettings(**VIT)
    assert differing(usual, PretrainSettings(**VIT, head="mlp")) == set()
    assert differing(usual, PretrainSettings(**VIT, positions="sincos")) == {"model.pos_embed"}


def test_with_maes_weights_it_is_not():
    start = {"positions": "sincos", "weight_init": "mae"}
    linear, deeper = PretrainSettings(**VIT, **start), PretrainSettings(**VIT, **start, head="blocks_1")
    assert start_of("model", linear) == start_of("model", deeper)
    assert "model.blocks.0.attn.qkv.weight" in differing(linear, deeper)
