import pytest
import torch

from simmimlib.model.encoders import create_encoder
from simmimlib.model.fcmae import FCMAE
from simmimlib.model.masking import MaskGenerator, upsample_mask
from small_models import SMALL_CONVNEXT, build, shake

SIZES = {  # name and image size, side of a mask patch, changes: MLPs of 1 x 1 convolutions, and of linear layers
    "convolutions": ("convnextv2_atto", 96, 32, {}),
    "linear layers": ("convnextv2_tiny", 96, 32, {}),
    "small images": ("convnextv2_tiny", 32, 8, {"patch_size": 1}),
}


def build_fcmae(name, **changes):
    timm_name, size, patch, kwargs = SIZES[name]
    torch.manual_seed(0)
    encoder = create_encoder(timm_name, size, mask_token=False, **SMALL_CONVNEXT, **kwargs)
    model = shake(FCMAE(encoder, **changes))
    mask = MaskGenerator(size, patch, encoder.patch_size)(2, torch.Generator().manual_seed(0))
    return model, torch.randn(2, 3, size, size), mask


@pytest.mark.parametrize("name", SIZES)
@torch.no_grad()
def test_a_hidden_pixel_never_reaches_a_visible_position(name):
    model, images, mask = build_fcmae(name)
    hidden = upsample_mask(mask, model.encoder.patch_size)
    raw = model(images, mask).raw
    assert raw.shape == images.shape
    assert torch.equal(model(torch.where(hidden, 1e3, images), mask).raw, raw)
    assert not torch.allclose(model(torch.where(hidden, images, 1e3), mask).raw, raw)


@pytest.mark.parametrize("name", SIZES)
@torch.no_grad()
def test_with_everything_visible_it_is_timm(name):
    model, images, mask = build_fcmae(name)
    features = model.encode(images, torch.zeros_like(mask))
    torch.testing.assert_close(features, model.encoder(images))
    assert not torch.allclose(model.encode(images, mask), features)


def test_masks_of_parts_of_a_position_are_refused():
    model, images, mask = build_fcmae("small images")
    mask[0, 0, 0] = ~mask[0, 0, 0]
    with pytest.raises(ValueError, match=r"mask that hides parts .* must hide squares of 8 x 8 tokens"):
        model(images, mask)


def test_every_parameter_has_a_gradient():
    """Several processes wait for each; the norm of timm's classifier is none of them."""
    model, images, mask = build_fcmae("small images", decoder_depth=2)
    model(images, mask).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert len(model.decoder) == 2 and model.proj.out_channels == 16


@pytest.mark.parametrize("name", ["vit", "convnext v2"])
def test_other_encoders_are_refused(name):
    with pytest.raises(ValueError, match="FCMAE takes timm's ConvNeXtV2, created with mask_token=False"):
        FCMAE(build(name)[0])
    with pytest.raises(ValueError, match="decoder_depth = 0: must be 1 or more"):
        FCMAE(create_encoder("convnextv2_atto", 32, mask_token=False, **SMALL_CONVNEXT), decoder_depth=0)
