import pytest
import torch

from simmimlib.model.encoders import create_encoder
from simmimlib.model.mae import MAE, init_mae
from simmimlib.model.masking import MaskGenerator, upsample_mask
from simmimlib.model.targets import TARGETS
from small_models import SMALL_VIT, build


def build_mae(name="vit_tiny_patch16_224", in_chans=3, target="pixels", **changes):
    """An MAE of 8 x 8 tokens of 8 pixels, two images for it, and masks of 48 tokens for them."""
    torch.manual_seed(0)
    encoder = create_encoder(
        name, 64, in_chans, mask_token=False, positions="sincos", patch_size=8, **{**SMALL_VIT, **changes}
    )
    model = MAE(encoder, decoder_depth=1, target=target).eval()
    init_mae(model)
    mask = MaskGenerator(64, 8, 8, 0.75)(2, torch.Generator().manual_seed(0))
    return model, torch.randn(2, in_chans, 64, 64), mask


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_wee_patch16_reg1_gap_256"]
)
@torch.no_grad()
def test_a_hidden_pixel_never_reaches_the_encoder(name):
    model, images, mask = build_mae(name)
    hidden = upsample_mask(mask, 8)
    raw = model(images, mask).raw
    assert raw.shape == images.shape
    assert torch.equal(model(torch.where(hidden, torch.nan, images), mask).raw, raw)
    assert not torch.allclose(model(torch.where(hidden, images, 1e3), mask).raw, raw)


@torch.no_grad()
def test_the_encoder_computes_the_visible_tokens_alone(monkeypatch):
    model, images, mask = build_mae()
    lengths = []
    for block in [*model.encoder.model.blocks, *model.decoder_blocks]:
        block.register_forward_hook(lambda module, inputs, output: lengths.append(output.shape[1]))
    model(images, mask)
    assert lengths == [1 + 16, 1 + 16, 1 + 64], "class token; 16 of 64 tokens visible; the decoder has all"


@torch.no_grad()
def test_with_everything_visible_the_encoder_is_timm():
    """Positions stay with their tokens when others are left out."""
    model, images, _ = build_mae()
    order = torch.arange(64).flip(0).view(1, 64, 1).expand(2, -1, -1)
    tokens = model.encode(images, order)
    torch.testing.assert_close(tokens[:, 1:].flip(1).unflatten(1, (8, 8)).permute(0, 3, 1, 2), model.encoder(images))


@torch.no_grad()
def test_what_training_knows_beforehand_changes_nothing():
    model, images, mask = build_mae()
    expected = model(images, mask).loss
    model.visible = 16
    assert torch.equal(model.train()(images, mask).loss, expected)
    other = MaskGenerator(64, 16, 8, 0.5)(2, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"mask with 32 to 32 visible tokens .* each image must have 16, as the model"):
        model(images, other)
    assert model.eval()(images, other).raw.shape == images.shape, "evaluation takes masks of any ratio"


def test_masks_that_do_not_fit_are_refused():
    model, images, mask = build_mae()
    with pytest.raises(ValueError, match="mask with 0 to 0 visible tokens an image: MAE's encoder sees"):
        model(images, torch.ones_like(mask))
    mask[0, 0, 0] = ~mask[0, 0, 0]
    with pytest.raises(ValueError, match=r"mask with 1\d to 1\d visible tokens an image"):
        model(images, mask)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("in_chans", [1, 4])
def test_every_target_and_channel_count(target, in_chans):
    model, images, mask = build_mae(in_chans=in_chans, target=target)
    output = model(images, mask)
    assert output.prediction.shape == images.shape and output.loss.isfinite()


def test_positions_are_fixed_and_those_of_the_class_token_zero():
    model, images, mask = build_mae()
    model(images, mask).loss.backward()
    positions = model.encoder.model.pos_embed
    assert not positions.requires_grad and positions.grad is None
    assert not positions[:, 0].any() and positions[:, 1:].std() > 0.5
    assert model.decoder_positions.shape == (1, 65, 16) and not model.decoder_positions[:, 0].any()
    without_gradient = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without_gradient == [], "several processes wait for every gradient"


@pytest.mark.parametrize("name", ["swin", "simmim vit", "vit", "convnext v2"])
def test_other_encoders_are_refused(name):
    with pytest.raises(ValueError, match="MAE takes timm's ViTs and DeiTs, created with mask_token=False"):
        MAE(build(name)[0])
