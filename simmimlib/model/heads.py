"""Prediction heads (paper section 3.4): from the encoder's feature map back to pixels.

The paper compares the linear head with three heavier ones and names two of them "inverse Swin-T" and "inverse Swin-B"
without saying what is inverted. Here an inverse Swin is the mirror image of the encoder of that name: its four stages
run from the deepest to the shallowest, each patch merging becomes a patch expanding (a linear layer that doubles the
channels, laid out as 2 x 2 positions), the patch embedding becomes a linear layer from each position to its pixels,
and a linear layer in front adapts the width. On Swin-B at 192 pixels the whole model then has 115.0 or 174.5 million
parameters; the paper reports 115.2 and 174.8.
"""

import math

from timm.layers import trunc_normal_
from timm.models.swin_transformer import SwinTransformerStage
from timm.models.vision_transformer import Block
from torch import Tensor, nn

BLOCKS = tuple(f"blocks_{n}" for n in (1, 2, 4, 8))
HEADS = ("linear", "mlp", *BLOCKS, "inverse_swin_t", "inverse_swin_b")
# width of the first stage, blocks and attention heads of each stage, as in Swin
SWIN = {
    "inverse_swin_t": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "inverse_swin_b": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
}


def create_head(
    kind: str,
    in_features: int,
    stride: int,
    out_chans: int = 3,
    grid: tuple[int, int] = (6, 6),
    width: int = 0,
    heads: int = 0,
) -> nn.Module:
    """A head [B, in_features, h, w] -> [B, out_chans, h * stride, w * stride].

    Args:
        kind: ``"linear"``: one 1x1 convolution to stride * stride * out_chans channels (3072 for Swin's stride 32 and
            RGB), laid out as pixels by a pixel shuffle. ``"mlp"``: a 1x1 convolution of the encoder's width and a GELU
            before it. ``"blocks_1"`` ... ``"blocks_8"``: so many transformer blocks before it, a head as deep as MAE's
            decoders. ``"inverse_swin_t"``, ``"inverse_swin_b"``: see above; where the stride has fewer than three
            factors of 2, so many of the shallow stages are left out.
        grid: (h, w), which the windows of an inverse Swin are fitted to.
        width: channels of the transformer blocks; 0 means the encoder's.
        heads: attention heads in each; 0 means one for 64 channels.

    Raises:
        ValueError: an unknown kind, a width that the attention heads cannot share, either of them without blocks.
    """
    if kind not in HEADS:
        raise ValueError(f"head = {kind!r}: allowed are {', '.join(HEADS)}")
    for name, value in (("decoder_width", width), ("decoder_heads", heads)):
        if value and kind not in BLOCKS:
            raise ValueError(f"{name} = {value}: must be 0 with head = {kind!r}, which has no transformer blocks")
    if kind in SWIN:
        return InverseSwin(in_features, stride, out_chans, grid, *SWIN[kind])
    width = width or in_features
    pixels = [nn.Conv2d(width, stride**2 * out_chans, kernel_size=1), nn.PixelShuffle(stride)]
    if kind == "mlp":
        return nn.Sequential(nn.Conv2d(width, width, kernel_size=1), nn.GELU(), *pixels)
    if kind in BLOCKS:
        depth = int(kind.removeprefix("blocks_"))
        return nn.Sequential(TransformerBlocks(in_features, depth, width, heads), *pixels)
    return nn.Sequential(*pixels)


class TransformerBlocks(nn.Module):
    """ViT blocks and a norm on a feature map; positions are in the features already. Arguments as in ``create_head``.

    [B, in_features, h, w] -> [B, width, h, w], by a linear layer in front where the two widths differ.
    """

    def __init__(self, in_features: int, depth: int, width: int, heads: int):
        super().__init__()
        heads = heads or next(n for n in range(max(1, width // 64), 0, -1) if width % n == 0)  # of 64 channels or more
        if width % heads:
            raise ValueError(f"decoder_width = {width}: must be a multiple of the {heads} decoder_heads")
        self.embed = nn.Linear(in_features, width) if width != in_features else nn.Identity()
        self.blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.apply(init_linear)

    def forward(self, features: Tensor) -> Tensor:
        tokens = self.embed(features.flatten(2).transpose(1, 2))  # [B, h * w, width]
        return self.norm(self.blocks(tokens)).transpose(1, 2).unflatten(2, features.shape[2:])


class InverseSwin(nn.Module):
    """Swin run backwards; arguments as in ``create_head`` and ``SWIN``."""

    def __init__(
        self,
        in_features: int,
        stride: int,
        out_chans: int,
        grid: tuple[int, int],
        width: int,
        depths: tuple[int, ...],
        heads: tuple[int, ...],
    ):
        super().__init__()
        expansions = min(len(depths) - 1, (stride & -stride).bit_length() - 1)  # factors of 2 in the stride
        deepest = len(depths) - 1
        self.adapt = nn.Conv2d(in_features, width * 2**deepest, kernel_size=1)
        # the largest usual window that divides the feature map, so that nothing is padded
        window = next(size for size in (7, 6, 8, 5, 4, 3, 2, 1) if math.gcd(*grid) % size == 0)
        self.stages, self.expand = nn.ModuleList(), nn.ModuleList()
        for step in range(expansions + 1):
            stage = deepest - step
            dim, resolution = width * 2**stage, tuple(side * 2**step for side in grid)
            self.stages.append(
                SwinTransformerStage(
                    dim, dim, resolution, depths[stage], False, heads[stage], window_size=window, dynamic_mask=True
                )
            )
            self.expand.append(PatchExpanding(dim) if step < expansions else nn.LayerNorm(dim))
        patch = stride // 2**expansions
        self.pixels = nn.Sequential(nn.Conv2d(dim, patch**2 * out_chans, kernel_size=1), nn.PixelShuffle(patch))
        self.apply(init_linear)

    def forward(self, features: Tensor) -> Tensor:
        x = self.adapt(features).permute(0, 2, 3, 1)  # [B, h, w, D]
        for stage, expand in zip(self.stages, self.expand, strict=True):
            x = expand(stage(x))
        return self.pixels(x.permute(0, 3, 1, 2))


class PatchExpanding(nn.Module):
    """The mirror of Swin's patch merging: [B, h, w, D] -> [B, 2h, 2w, D / 2]."""

    def __init__(self, dim: int):
        super().__init__()
        self.expansion = nn.Linear(dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(dim // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pixel_shuffle(self.expansion(x).permute(0, 3, 1, 2), 2)
        return self.norm(x.permute(0, 2, 3, 1))


def init_linear(module: nn.Module) -> None:
    """As timm's and the official Swin's: truncated normal of std 0.02, no bias."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
