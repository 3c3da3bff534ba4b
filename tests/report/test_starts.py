from simmimlib import PretrainSettings
from simmimlib.report.starts import start_of


def test_what_a_method_leaves_open_is_its_own():
    vit = {"encoder": "vit_tiny_patch16_224"}
    assert (
        start_of("model", PretrainSettings(**vit)) == "vit_tiny_patch16_224, learned positions, timm's initial weights"
    )
    mae = PretrainSettings(**vit, method="mae", mask_patch_size=16)
    simmim = PretrainSettings(**vit, positions="sincos", weight_init="mae")
    assert start_of("model", mae) == start_of("model", simmim)
    assert start_of("model", simmim) == "vit_tiny_patch16_224, sincos positions, mae's initial weights"


def test_encoders_without_such_positions_and_sections_of_their_own():
    convnext = PretrainSettings(encoder="convnextv2_atto", encoder_kwargs={})
    assert start_of("convnext", convnext) == "convnextv2_atto (convnext), timm's initial weights"
