"""Encoders that process mask tokens (paper section 3.3): any timm ViT, DeiT, BEiT, Swin or SwinV2.

SimMIM shows the encoder the whole image: masked tokens are replaced by one learnable vector right after the patch
embedding (and its norm, where it has one), before positions and blocks. A class token is never masked. Everything
else of the encoder is timm's own.
"""

import difflib
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed, trunc_normal_
from torch import Tensor, nn

# timm modules whose models start with `patch_embed` and end in one feature vector per token
FAMILIES = ("vision_transformer", "deit", "beit", "swin_transformer", "swin_transformer_v2")
EXAMPLES = (
    "vit_small_patch16_224, deit_tiny_patch16_224, beit_base_patch16_224, "
    "swin_tiny_patch4_window7_224, swinv2_tiny_window8_256, simmim_vit_base"
)
# The paper's ViT-B in pre-training: BEiT's, but one relative position bias table that all blocks share.
SIMMIM_VIT_BASE = ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True})


class MaskedPatchEmbed(PatchEmbed):
    """timm's patch embedding with a mask token. Takes images [B, C, H, W] or the pair (images, mask [B, h, w])."""

    mask_token: nn.Parameter  # [1, 1, D]

    def forward(self, inputs: Tensor | tuple[Tensor, Tensor | None]) -> Tensor:
        images, mask = inputs if isinstance(inputs, tuple) else (inputs, None)
        tokens = super().forward(images)  # [B, h * w, D] (ViT) or [B, h, w, D] (Swin)
        if mask is None:
            return tokens
        if mask.shape != (len(images), *self.grid_size):
            raise ValueError(f"mask of shape {tuple(mask.shape)}: must be {(len(images), *self.grid_size)}")
        hidden = mask.reshape(tokens.shape[:-1]).unsqueeze(-1)
        return torch.where(hidden, self.mask_token.to(tokens.dtype), tokens)


class Encoder(nn.Module):
    """A timm model that takes a mask and returns a feature map.

    ``model`` is the timm model itself, ``config`` what ``create_encoder`` was called with, ``patch_size`` the side of
    a token in pixels (the masks' grid), ``stride`` the side in pixels of one position of the feature map, which has
    ``grid_size`` positions and ``num_features`` channels.
    """

    def __init__(self, model: Any, config: dict):  # Any: timm's families have no class of their own in common
        super().__init__()
        self.model = model
        self.config = config
        self.patch_size: int = model.patch_embed.patch_size[0]
        self.stride: int = model.feature_info[-1]["reduction"]
        self.num_features: int = model.num_features
        self.grid_size: tuple[int, int] = tuple(side // self.stride for side in model.patch_embed.img_size)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """images [B, C, H, W], mask [B, H / patch_size, W / patch_size] or None -> [B, D, H / stride, W / stride]."""
        # Every family hands its input straight to `patch_embed`, so the pair travels through timm's own forward.
        features = self.model.forward_features((images, mask))
        if features.ndim == 3:  # ViT: [B, prefix + h * w, D]
            features = features[:, self.model.num_prefix_tokens :]
            features = features.unflatten(1, self.model.patch_embed.grid_size)
        return features.permute(0, 3, 1, 2)


def create_encoder(
    name: str,
    image_size: int | tuple[int, int],
    in_chans: int = 3,
    pretrained: bool = False,
    final_norm: bool = True,
    **timm_kwargs: Any,
) -> Encoder:
    """Builds an encoder with a mask token.

    Args:
        name: a timm name of the families ViT, DeiT, BEiT, Swin, SwinV2, or ``"simmim_vit_base"``, the paper's ViT-B
            (one shared relative bias, LayerScale 0.1, no absolute positions).
        image_size: side in pixels, or (height, width); a multiple of the encoder's stride.
        in_chans: image channels.
        pretrained: start from timm's weights (downloads them).
        final_norm: keep the layer norm after the last block, as the released models do. One re-implementation found
            that pre-training a ViT without it helps linear probing.
        timm_kwargs: passed on, for example ``patch_size=4, embed_dim=96, depth=4, num_heads=3`` or ``window_size=6``.

    Raises:
        ValueError: a name timm does not know, a family that cannot take mask tokens, an image size that does not fit.
    """
    config = {"name": name, "image_size": image_size, "in_chans": in_chans, **timm_kwargs}
    timm_name, defaults = SIMMIM_VIT_BASE if name == "simmim_vit_base" else (name, {})
    check_encoder_name(timm_name)
    try:
        model = timm.create_model(
            timm_name,
            pretrained=pretrained,
            img_size=image_size,
            in_chans=in_chans,
            num_classes=0,
            # no pooling, so that the final norm stays; distilled DeiT knows only "token", which keeps it too
            global_pool="token" if "distilled" in timm_name else "",
            **{"drop_path_rate": 0.0, **defaults, **timm_kwargs},  # timm's Swin would drop paths by default
        )
        # timm builds a BEiT and a SwinV2 of any width, which then fail at their first image
        attention: list[Any] = [module for module in model.modules() if hasattr(module, "qkv")]
        if any(module.qkv.in_features % module.num_heads for module in attention):
            raise ValueError("embed_dim must be a multiple of num_heads")
    except (ArithmeticError, AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        why = str(error) or "embed_dim must be a multiple of num_heads"
        raise ValueError(f"encoder_kwargs = {timm_kwargs}: timm cannot build {timm_name} so ({why})") from error
    if name == "simmim_vit_base":
        init_simmim_vit(model)
    if not final_norm:
        config["final_norm"] = False
        model.norm = nn.Identity()
    add_mask_token(model.patch_embed)  # type: ignore[arg-type]
    encoder = Encoder(model, config)
    height, width = model.patch_embed.img_size  # type: ignore[union-attr, misc]
    if height % encoder.stride or width % encoder.stride:
        raise ValueError(f"image_size = {image_size}: must be a multiple of {encoder.stride}, the stride of {name}")
    return encoder


def check_encoder_name(name: str) -> None:
    """Raises ValueError unless ``name`` is a timm model of a family that can take mask tokens."""
    base = name.partition(".")[0]
    if any(base in timm.list_models(module=family) for family in FAMILIES):
        return
    known = timm.list_models()
    if base in known:
        raise ValueError(
            f"encoder = {name!r}: this family cannot take mask tokens; any timm ViT, DeiT, BEiT, Swin or SwinV2 can, "
            f"for example {EXAMPLES}"
        )
    near = difflib.get_close_matches(base, [m for f in FAMILIES for m in timm.list_models(module=f)], n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(f"encoder = {name!r}: timm {timm.__version__} has no such model; {hint}Examples: {EXAMPLES}")


def add_mask_token(embed: PatchEmbed) -> None:
    # timm's SwinV2 and BEiT build their patch embedding themselves, so the built one is given the class that takes
    # a mask; its parameters keep timm's names.
    embed.__class__ = MaskedPatchEmbed
    embed.mask_token = nn.Parameter(torch.zeros(1, 1, embed.proj.out_channels))
    trunc_normal_(embed.mask_token, std=0.02, a=-0.02, b=0.02)


def init_simmim_vit(model: nn.Module) -> None:
    """The official pre-training initialisation: normal of std 0.02 cut at one std; residual outputs scaled by depth."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02, a=-0.02, b=0.02)
    trunc_normal_(model.cls_token, std=0.02, a=-0.02, b=0.02)
    model.fix_init_weight()  # type: ignore[operator]
