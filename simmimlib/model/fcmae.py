"""FCMAE (Woo et al., ConvNeXt V2, CVPR 2023): MAE for convolutions, whose encoder sees the visible pixels only.

The official encoder runs on sparse tensors. This one is dense and gives the same numbers: hidden positions are zero
wherever positions mix, in front of each depthwise convolution and in the statistics of each GRN. It saves no time.
GRN takes its statistics of each image by itself, as in fine-tuning and in the JAX code that the paper's numbers come
from; the PyTorch release takes them over all visible positions of a batch. Weights start as timm's (std 0.02): the
release, which names no other, starts from 1.0. Names of the decoder's parts are the official code's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models.convnext import ConvNeXt, ConvNeXtBlock
from torch import Tensor, nn

from simmimlib.model.encoders import Encoder
from simmimlib.model.mim import MaskedImageModel
from simmimlib.model.targets import create_target


class FCMAE(MaskedImageModel):
    """Predicts the hidden pixels of normalised images from the visible ones, by convolutions.

    Args:
        encoder: a ConvNeXtV2 from ``create_encoder(..., mask_token=False)``.
        decoder_width: channels of the decoder (official: 512); 0 means half of the encoder's.
        decoder_depth: ConvNeXtV2 blocks of the decoder (official: 1).
        loss, scope, target, beta, mean, std: as of ``SimMIM``; the official recipe is ``"l2"`` of
            ``"normalised_pixels"``.

    Masks have to hide whole positions of the feature map, squares of ``encoder.stride`` pixels; those on the CPU are
    checked.

    Raises:
        ValueError: an encoder that is no ConvNeXtV2 or has a mask token.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder_width: int = 0,
        decoder_depth: int = 1,
        loss: str = "l2",
        scope: str = "masked",
        target: str = "normalised_pixels",
        beta: float = 1.0,
        mean: float | list[float] = 0.5,
        std: float | list[float] = 0.25,
    ):
        if not isinstance(encoder.model, ConvNeXt) or encoder.has_mask_token:
            raise ValueError(
                f"encoder = {encoder.config['name']!r}: FCMAE takes timm's ConvNeXtV2, created with mask_token=False"
            )
        if decoder_depth < 1:
            raise ValueError(f"decoder_depth = {decoder_depth}: must be 1 or more")
        stride, width = encoder.stride, decoder_width or encoder.num_features // 2
        scored = create_target(target, encoder.config["in_chans"], loss, beta, stride, mean, std)
        config = {"decoder_width": width, "decoder_depth": decoder_depth, "loss": loss, "target": target, "beta": beta}
        super().__init__(encoder, scored, scope, config)
        self.proj = nn.Conv2d(encoder.num_features, width, kernel_size=1)
        self.mask_token = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.decoder = nn.Sequential(
            *(ConvNeXtBlock(width, use_grn=True, ls_init_value=None) for _ in range(decoder_depth))
        )
        self.pred = nn.Conv2d(width, stride**2 * scored.channels, kernel_size=1)
        for part in (self.proj, self.decoder, self.pred):
            part.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def predict(self, images: Tensor, mask: Tensor) -> Tensor:
        if mask.device.type == "cpu":  # elsewhere it would wait for the device
            check_squares(mask, self.encoder)
        features = self.encode(images, mask)  # [B, D, H / stride, W / stride]
        hidden = mask_at(mask, features.shape[2:])
        x = self.proj(features)
        x = torch.where(hidden, self.mask_token.to(x.dtype), x)
        return F.pixel_shuffle(self.pred(self.decoder(x)), self.encoder.stride)

    def encode(self, images: Tensor, mask: Tensor) -> Tensor:
        """images [B, C, H, W], mask [B, h, w] -> features [B, D, H / stride, W / stride], meaningless where hidden."""
        x = self.encoder.model.stem(images)  # a pixel stays within its patch
        for stage in self.encoder.model.stages:
            x = stage.downsample(x)  # 2 x 2 positions, all hidden or all visible
            visible = ~mask_at(mask, x.shape[2:])
            for block in stage.blocks:
                x = masked_block(block, x, visible)
        return x


def masked_block(block: Any, x: Tensor, visible: Tensor) -> Tensor:
    """timm's ConvNeXtV2 block on visible positions only; x [B, D, h, w], visible [B, 1, h, w].

    Only the depthwise convolution and GRN mix positions, so that hidden ones are zeroed there and nowhere else.
    """
    channels_last = not block.use_conv_mlp
    y = block.conv_dw(x * visible)
    if channels_last:
        y, visible = y.permute(0, 2, 3, 1), visible.permute(0, 2, 3, 1)
    y = block.mlp.act(block.mlp.fc1(block.norm(y)))
    y = block.mlp.fc2(block.mlp.grn(y * visible))
    return x + block.drop_path(y.permute(0, 3, 1, 2) if channels_last else y)


def check_squares(mask: Tensor, encoder: Encoder) -> None:
    """Raises ValueError unless a token mask [B, h, w] hides or shows each position of the feature map as a whole."""
    side = encoder.stride // encoder.patch_size
    hidden = F.avg_pool2d(mask.float().unsqueeze(1), side)
    if not ((hidden == 0) | (hidden == 1)).all():
        raise ValueError(
            f"mask that hides parts of a position of the feature map: must hide squares of {side} x {side} tokens "
            f"({encoder.stride} pixels, the encoder's stride)"
        )


def mask_at(mask: Tensor, size: torch.Size) -> Tensor:
    """A token mask [B, h, w] on a coarser grid of ``size``, [B, 1, *size]: that of each square's first token."""
    step = mask.shape[1] // size[0], mask.shape[2] // size[1]
    return mask[:, None, :: step[0], :: step[1]]


def init_weights(module: nn.Module) -> None:
    """As timm's ConvNeXt: truncated normal of std 0.02, no bias."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)  # type: ignore[arg-type]
