"""Small encoders of every family, and the same weights in the official and in Hugging Face's wrapping."""

import re

import pytest
import torch

from conftest import ROOT
from simmimlib.model.encoders import create_encoder
from simmimlib.model.masking import MaskGenerator
from simmimlib.model.simmim import SimMIM

SMALL_VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}
SMALL_CONVNEXT = {"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32]}
SMALL_SWIN = {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)}
ENCODERS = {
    "vit": ("vit_tiny_patch16_224", 64, {**SMALL_VIT, "patch_size": 8}),
    "vit32": ("vit_base_patch32_224", 96, SMALL_VIT),
    "deit distilled": ("deit_tiny_distilled_patch16_224", 64, SMALL_VIT),
    "vit dynamic": ("vit_tiny_patch16_224", 64, {**SMALL_VIT, "dynamic_img_size": True}),
    "beit": ("beit_base_patch16_224", 64, SMALL_VIT),
    "simmim vit": ("simmim_vit_base", 64, SMALL_VIT),
    "swin": ("swin_tiny_patch4_window7_224", 64, {**SMALL_SWIN, "window_size": 4}),
    "swin padded": ("swin_tiny_patch4_window7_224", 96, SMALL_SWIN),
    "swin v2": ("swinv2_tiny_window8_256", 64, {**SMALL_SWIN, "window_size": 4}),
    "convnext v2": ("convnextv2_atto", 64, SMALL_CONVNEXT),
    "convnext v2 fine": ("convnextv2_nano", 32, {**SMALL_CONVNEXT, "patch_size": 1}),
    "swin wide": ("swin_tiny_patch4_window7_224", (64, 96), {**SMALL_SWIN, "window_size": 2}),
}

# the sizes of the official code's golden numbers
VIT = {"embed_dim": 48, "depth": 2, "num_heads": 4}
SWIN = {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8), "window_size": 2}
OFFICIAL = {"swin": ("swin_tiny_patch4_window7_224", SWIN), "vit": ("simmim_vit_base", VIT)}


def golden(name):
    """A file of the official code's numbers (``tests/golden/README.md``)."""
    return ROOT / "tests/golden" / name


def build(name, in_chans=3):
    """An encoder of ``ENCODERS``, two images for it, and masks for them."""
    timm_name, size, kwargs = ENCODERS[name]
    torch.manual_seed(0)
    encoder = create_encoder(timm_name, size, in_chans, **kwargs).eval()
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.randn(2, in_chans, height, width)
    mask_patch = 32 if size != 32 else 8
    mask = MaskGenerator(size, mask_patch, encoder.patch_size)(2, torch.Generator().manual_seed(0))
    return encoder, images, mask


def mask_token_of(model):
    (token,) = [parameter for name, parameter in model.named_parameters() if name.endswith("mask_token")]
    return token


def shake(model):
    """Random everywhere: also where a new model has zeros, such as bias tables and position embeddings."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


def build_official(name, size=64, **kwargs):
    """A shaken SimMIM of the official sizes, or of a plain ViT of the same size."""
    timm_name, sizes = {**OFFICIAL, "plain vit": ("vit_tiny_patch16_224", VIT)}[name]
    return SimMIM(shake(create_encoder(timm_name, size, **{**sizes, **kwargs}))).eval()


def to_official(state):
    """A timm or simmimlib state under the official names; Swin's downsample goes back to the end of its stage."""
    names = {}
    for name in state:
        new = re.sub(r"layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)
        new = re.sub(r"^head\.(?=\d)", "decoder.", new.replace("head.fc.", "head."))
        names[name] = new.replace("encoder.model.", "encoder.").replace("patch_embed.mask_token", "mask_token")
    return {names[name]: tensor.clone() for name, tensor in state.items()}


def hugging_face(name):
    transformers = pytest.importorskip("transformers")
    common = {"image_size": 64, "num_channels": 3}
    if name == "swin":
        sizes = {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "window_size": 2}
        config = transformers.SwinConfig(patch_size=4, encoder_stride=32, **sizes, **common)
        return shake(transformers.SwinForMaskedImageModeling(config))
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 192}
    # theirs defaults to an epsilon of 1e-12 in the norms, timm's ViT has 1e-6
    config = transformers.ViTConfig(patch_size=16, encoder_stride=16, layer_norm_eps=1e-6, **sizes, **common)
    return shake(transformers.ViTForMaskedImageModeling(config))
