"""Encoders that process mask tokens (paper section 3.3): any timm ViT, DeiT, BEiT, Swin, SwinV2 or ConvNeXtV2.

SimMIM shows the encoder the whole image: masked tokens are replaced by one learnable vector right after the patch
embedding (and its norm, where it has one), before positions and blocks. A class token is never masked. Everything
else of the encoder is timm's own. The encoders of MAE and FCMAE are the same ones without a mask token.
"""

import difflib
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed, build_sincos2d_pos_embed, trunc_normal_
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from simmimlib.model.masking import check_mask

# timm modules whose models start with `patch_embed` (ConvNeXt: `stem`) and end in one feature vector per position
FAMILIES = ("vision_transformer", "deit", "beit", "swin_transformer", "swin_transformer_v2", "convnext")
ALLOWED = "any timm ViT, DeiT, BEiT, Swin, SwinV2 or ConvNeXtV2"
EXAMPLES = (
    "vit_small_patch16_224, deit_tiny_patch16_224, beit_base_patch16_224, swin_tiny_patch4_window7_224, "
    "swinv2_tiny_window8_256, convnextv2_tiny, simmim_vit_base"
)
POSITIONS = ("learned", "sincos")
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
        hidden = mask.reshape(tokens.shape[:-1]).unsqueeze(-1)
        return torch.where(hidden, self.mask_token.to(tokens.dtype), tokens)


class MaskedStem(nn.Sequential):
    """timm's ConvNeXt stem with a mask token. Takes images [B, C, H, W] or the pair (images, mask [B, h, w])."""

    mask_token: nn.Parameter  # [1, 1, D], as of the others

    def forward(self, inputs: Tensor | tuple[Tensor, Tensor | None]) -> Tensor:
        images, mask = inputs if isinstance(inputs, tuple) else (inputs, None)
        positions = super().forward(images)  # [B, D, h, w]
        if mask is None:
            return positions
        token = self.mask_token.to(positions.dtype).view(1, -1, 1, 1)
        return torch.where(mask.unsqueeze(1), token, positions)


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
        size = config["image_size"]
        first = model.stem if is_convnext(model) else model.patch_embed
        self.has_mask_token = hasattr(first, "mask_token")
        self.patch_size: int = first[0].stride[0] if is_convnext(model) else first.patch_size[0]
        self.stride: int = model.feature_info[-1]["reduction"]
        self.num_features: int = model.num_features
        height, width = (size, size) if isinstance(size, int) else size
        self.grid_size: tuple[int, int] = (height // self.stride, width // self.stride)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """images [B, C, H, W], mask [B, H / patch_size, W / patch_size] or None -> [B, D, H / stride, W / stride]."""
        if mask is not None:
            if not self.has_mask_token:
                raise ValueError("this encoder was created without a mask token: it takes whole images only")
            check_mask(mask, images, self.patch_size)
        # every family hands its input straight to `patch_embed` or `stem`: the pair travels through timm's own forward
        features = self.model.forward_features(images if mask is None else (images, mask))
        if is_convnext(self.model):
            return features
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
    mask_token: bool = True,
    positions: str = "learned",
    **timm_kwargs: Any,
) -> Encoder:
    """Builds an encoder.

    Args:
        name: a timm name of the families ViT, DeiT, BEiT, Swin, SwinV2, ConvNeXtV2, or ``"simmim_vit_base"``, the
            paper's ViT-B (one shared relative bias, LayerScale 0.1, no absolute positions).
        image_size: side in pixels, or (height, width); a multiple of the encoder's stride.
        in_chans: image channels.
        pretrained: start from timm's weights (downloads them).
        final_norm: keep the layer norm after the last block, as the released models do.
        mask_token: with one for SimMIM, without for MAE and FCMAE, whose encoders see no hidden pixel.
        positions: of a ViT or DeiT with absolute ones, ``"sincos"`` puts MAE's fixed sines and cosines in their place.
        timm_kwargs: passed on, as ``embed_dim=96, depth=4`` or ``window_size=6``; a ConvNeXtV2 with ``patch_size=1``
            has a stride of 8, for small images.

    Raises:
        ValueError: a name timm does not know, a family that cannot take mask tokens, an image size that does not fit.
    """
    config = {"name": name, "image_size": image_size, "in_chans": in_chans, **timm_kwargs}
    timm_name, defaults = SIMMIM_VIT_BASE if name == "simmim_vit_base" else (name, {})
    check_encoder_name(timm_name)
    sized: dict[str, Any] = {} if timm_name.startswith("convnext") else {"img_size": image_size}
    try:
        model = timm.create_model(
            timm_name,
            pretrained=pretrained,
            **sized,
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
    if is_convnext(model):
        if not final_norm:
            raise ValueError(f"final_norm = False: {name} has no norm after its last block")
        model.head = nn.Identity()  # its norm comes after the pooling and belongs to fine-tuning
    elif not final_norm:
        config["final_norm"] = False
        model.norm = nn.Identity()
    if positions != "learned":
        config["positions"] = positions
        fix_positions(model, name, positions)
    if mask_token:
        add_mask_token(model)
    else:
        config["mask_token"] = False
    encoder = Encoder(model, config)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height % encoder.stride or width % encoder.stride:
        raise ValueError(f"image_size = {image_size}: must be a multiple of {encoder.stride}, the stride of {name}")
    return encoder


def check_encoder_name(name: str) -> None:
    """Raises ValueError unless ``name`` is a timm model of a family that can take mask tokens."""
    base = name.partition(".")[0]
    allowed = [model for family in FAMILIES for model in timm.list_models(module=family)]
    allowed = [model for model in allowed if "convnext" not in model or model.startswith("convnextv2")]
    if base in allowed:
        return
    known = timm.list_models()
    if base in known:
        raise ValueError(
            f"encoder = {name!r}: this family cannot take mask tokens here; {ALLOWED} can, for example {EXAMPLES}"
        )
    near = difflib.get_close_matches(base, allowed, n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(f"encoder = {name!r}: timm {timm.__version__} has no such model; {hint}Examples: {EXAMPLES}")


def is_convnext(model: Any) -> bool:
    return isinstance(model, ConvNeXt)


def stages_of(model: Any) -> list[list[nn.Module]]:
    """The blocks of a timm model, stage by stage; a ViT is one stage."""
    stages = model.stages if is_convnext(model) else getattr(model, "layers", [model])
    return [list(stage.blocks) for stage in stages]


def blocks_of(model: Any) -> list[nn.Module]:
    """The blocks of a timm model, first to last; of a Swin or ConvNeXt those of all stages."""
    return [block for blocks in stages_of(model) for block in blocks]


def add_mask_token(model: Any) -> None:
    # SwinV2 and BEiT build their patch embedding themselves: the built one is given the class that takes a mask
    convolutional = is_convnext(model)
    first = model.stem if convolutional else model.patch_embed
    first.__class__ = MaskedStem if convolutional else MaskedPatchEmbed
    width = first[0].out_channels if convolutional else first.proj.out_channels
    first.mask_token = nn.Parameter(torch.zeros(1, 1, width))
    # cut at one std as the official ViT's; the official Swin's is cut at -2 and 2, which hardly cuts
    trunc_normal_(first.mask_token, std=0.02, a=-0.02, b=0.02)


def fix_positions(model: Any, name: str, positions: str) -> None:
    """Puts fixed sines and cosines in the place of a ViT's learned positions."""
    if positions not in POSITIONS:
        raise ValueError(f"positions = {positions!r}: allowed are {', '.join(POSITIONS)}")
    learned = getattr(model, "pos_embed", None)
    if learned is None or learned.shape[2] % 4:
        raise ValueError(
            f"positions = 'sincos', which method = 'mae' uses too: {name} needs absolute positions of a multiple of 4 "
            "channels, as timm's ViTs and DeiTs have them"
        )
    grid = model.patch_embed.grid_size
    with torch.no_grad():
        learned.copy_(sincos_positions(grid, learned.shape[2], learned.shape[1] - grid[0] * grid[1]))
    learned.requires_grad_(False)


def sincos_positions(grid: tuple[int, int], width: int, prefix: int) -> Tensor:
    """MAE's positions [1, prefix + h * w, width]: sines, cosines of the column, then of the row; zeros for a prefix."""
    row_first = build_sincos2d_pos_embed(list(grid), width, interleave_sin_cos=True)
    column_first = row_first.roll(width // 2, dims=1)
    return torch.cat([torch.zeros(prefix, width), column_first]).unsqueeze(0)


def init_simmim_vit(model: nn.Module) -> None:
    """The official pre-training initialisation: normal of std 0.02 cut at one std; residual outputs scaled by depth."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            trunc_normal_(module.weight, std=0.02, a=-0.02, b=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    trunc_normal_(model.cls_token, std=0.02, a=-0.02, b=0.02)
    model.fix_init_weight()  # type: ignore[operator]
