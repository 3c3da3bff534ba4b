import pytest
import torch
from timm.layers import DropPath

from simmimlib.model.encoders import create_encoder
from simmimlib.weights.export import export_timm
from small_models import ENCODERS, SMALL_VIT, build, mask_token_of

WIDTH = {"swin": 16, "swin padded": 16, "swin v2": 16, "swin wide": 16, "convnext v2": 8, "convnext v2 fine": 8}


@pytest.mark.parametrize("name", ENCODERS)
def test_masked_pixels_cannot_influence_the_output(name):
    encoder, images, mask = build(name)
    hidden = mask.repeat_interleave(encoder.patch_size, 1).repeat_interleave(encoder.patch_size, 2).unsqueeze(1)
    with torch.no_grad():
        features = encoder(images, mask)
        assert torch.equal(encoder(torch.where(hidden, 1e3, images), mask), features)
        assert not torch.allclose(encoder(torch.where(hidden, images, 1e3), mask), features)
        mask_token_of(encoder).add_(1)  # and the mask token does
        assert not torch.allclose(encoder(images, mask), features)


@pytest.mark.parametrize("name", ["vit", "beit", "swin", "swin v2", "deit distilled", "convnext v2"])
def test_without_a_mask_it_is_timm(name):
    encoder, images, _ = build(name)
    plain = export_timm(encoder).eval()
    assert not any("mask_token" in key for key in plain.state_dict())
    with torch.no_grad():
        expected = plain.forward_features(images)
        if expected.ndim == 3:
            expected = expected[:, plain.num_prefix_tokens :].unflatten(1, encoder.model.patch_embed.grid_size)
        assert torch.equal(encoder(images), expected if "convnext" in name else expected.permute(0, 3, 1, 2))


def test_without_the_final_norm():
    torch.manual_seed(0)
    encoder = create_encoder("vit_tiny_patch16_224", 32, final_norm=False, patch_size=8, **SMALL_VIT)
    images = torch.randn(1, 3, 32, 32)
    plain = export_timm(encoder).eval()
    with torch.no_grad():
        expected = plain.forward_features(images)[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
        torch.testing.assert_close(encoder.eval()(images), expected)
    assert export_timm(encoder, 10, "avg")(images).shape == (1, 10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: create_encoder("resnet50", 224), "encoder = 'resnet50': this family cannot take mask tokens"),
        (lambda: create_encoder("swin_tny_patch4_window7_224", 224), "did you mean swin_tiny_patch4_window7_224"),
        (lambda: create_encoder("vit_tiny_patch16_224", 60), "image_size = 60: must be a multiple of 16"),
        (lambda: create_encoder("swin_tiny_patch4_window7_224", 48), "image_size = 48: must be a multiple of 32"),
        (lambda: create_encoder("vit_tiny_patch16_224", (64, 60)), "image_size = (64, 60): must be a multiple of 16"),
        (lambda: build("vit")[0](torch.zeros(1, 3, 64, 64), torch.zeros(1, 4, 4).bool()), "must be (1, 8, 8)"),
        (
            lambda: build("convnext v2")[0](torch.zeros(1, 3, 64, 64), torch.zeros(1, 4, 4).bool()),
            "(1, 16, 16)",
        ),
        (
            lambda: create_encoder("convnext_tiny", 224),
            "encoder = 'convnext_tiny': this family cannot take mask tokens",
        ),
        (lambda: create_encoder("convnextv2_atto", 48), "image_size = 48: must be a multiple of 32"),
        (lambda: create_encoder("convnextv2_atto", 64, final_norm=False), "final_norm = False: convnextv2_atto has no"),
        (lambda: create_encoder("swin_tiny_patch4_window7_224", 224, positions="sincos"), "needs absolute positions"),
        (lambda: create_encoder("vit_tiny_patch16_224", 64, positions="rotary"), "positions = 'rotary': allowed are"),
        (
            lambda: create_encoder("vit_tiny_patch16_224", 32, mask_token=False)(
                torch.zeros(1, 3, 32, 32), torch.zeros(1, 2, 2).bool()
            ),
            "created without a mask token",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "kwargs", "why"),
    [
        ("vit", {"num_heads": 5}, "divisible"),
        ("vit", {"embed_dim": 33}, "divisible"),
        ("vit", {"num_heads": "two"}, ""),
        ("vit", {"embed_dim": 32.5}, ""),
        ("vit", {"heads": 2}, "unexpected keyword argument 'heads'"),
        ("deit distilled", {"num_heads": 3}, "divisible"),
        ("beit", {"num_heads": 3}, "multiple of num_heads"),
        ("swin v2", {"num_heads": (3, 3, 3, 3)}, "multiple of num_heads"),
        ("swin", {"num_heads": 2}, ""),
        ("vit", {"num_heads": 0}, ""),
        ("vit", {"embed_dim": -4}, ""),
        ("swin", {"num_heads": (1, 2)}, ""),
    ],
)
def test_encoder_kwargs_that_timm_cannot_build_are_named(name, kwargs, why):
    timm_name, size, right = ENCODERS[name]
    with pytest.raises(ValueError) as error:
        create_encoder(timm_name, size, **{**right, **kwargs})
    message = str(error.value)
    assert message.startswith("encoder_kwargs = {") and f"timm cannot build {timm_name} so (" in message
    assert all(f"{key!r}: {value!r}" in message for key, value in kwargs.items()) and why in message


def test_no_paths_are_dropped_unless_asked_for():
    """timm's Swin drops a tenth of them by default."""
    timm_name, size, kwargs = ENCODERS["swin"]
    for asked, expected in (({}, 0), ({"drop_path_rate": 0.3}, 0.3)):
        encoder = create_encoder(timm_name, size, **kwargs, **asked)
        rates = [module.drop_prob for module in encoder.modules() if isinstance(module, DropPath)]
        assert max(rates, default=0) == pytest.approx(expected)


def test_the_papers_vit_shares_one_bias_table_and_has_no_absolute_positions():
    torch.manual_seed(0)
    model = create_encoder("simmim_vit_base", 64, depth=4, embed_dim=64, num_heads=2).model
    tables = [name for name in model.state_dict() if name.endswith("relative_position_bias_table")]
    assert tables == ["rel_pos_bias.relative_position_bias_table"] and model.pos_embed is None
    assert all(block.gamma_1.eq(0.1).all() and block.gamma_2.eq(0.1).all() for block in model.blocks)
    # official initialisation: normal of std 0.02 cut at one std, residual outputs of block n divided by sqrt(2 n)
    for number, block in enumerate(model.blocks, 1):
        for weight, largest in (
            (block.attn.qkv.weight, 0.02),
            (block.mlp.fc1.weight, 0.02),
            (block.attn.proj.weight, 0.02 / (2 * number) ** 0.5),
            (block.mlp.fc2.weight, 0.02 / (2 * number) ** 0.5),
        ):
            assert 0.95 * largest < weight.abs().max() <= 1.0001 * largest
    assert 0 < model.cls_token.abs().max() <= 0.02
    projection = model.patch_embed.proj
    assert 0.019 < projection.weight.abs().max() <= 0.02 and not projection.bias.any()


@pytest.mark.parametrize("name", ENCODERS)
def test_the_mask_token_starts_small_and_not_at_zero(name):
    encoder, _, _ = build(name)
    token = mask_token_of(encoder)
    assert token.shape == (1, 1, WIDTH.get(name, 32)) and token.requires_grad
    assert token.abs().max() <= 0.02 and token.std() > 0.005
