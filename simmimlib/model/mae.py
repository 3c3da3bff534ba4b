"""MAE (He et al., CVPR 2022): the encoder sees the visible tokens only, a decoder fills in the mask tokens.

Against SimMIM: no mask token in the encoder, which therefore costs less; positions are fixed sines and cosines; the
decoder is a ViT of its own, narrower than the encoder. Names of the decoder's parts are the official code's.
"""

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from simmimlib.model.encoders import Encoder, sincos_positions
from simmimlib.model.mim import MaskedImageModel
from simmimlib.model.targets import create_target


class MAE(MaskedImageModel):
    """Predicts the hidden pixels of normalised images from the visible tokens.

    Args:
        encoder: a timm ViT from ``create_encoder(..., mask_token=False, positions="sincos")``.
        decoder_width: channels of the decoder, a multiple of four; 0 means half of the encoder's.
        decoder_depth: transformer blocks of the decoder (official: 8).
        decoder_heads: attention heads in each; 0 means one for 32 channels, as the official 16 for 512.
        loss, scope, target, beta, mean, std: as of ``SimMIM``; the official recipe is ``"l2"`` of
            ``"normalised_pixels"``.
        visible: visible tokens of every image in training, known beforehand, so that shapes are static for a compiler
            and no step waits for the device. None, and evaluation, count them in the mask; masks on the CPU are
            counted always.

    Raises:
        ValueError: an encoder that is no timm ViT or has a mask token, sizes that do not fit.
    """

    decoder_positions: Tensor  # [1, prefix + h * w, d]

    def __init__(
        self,
        encoder: Encoder,
        decoder_width: int = 0,
        decoder_depth: int = 8,
        decoder_heads: int = 0,
        loss: str = "l2",
        scope: str = "masked",
        target: str = "normalised_pixels",
        beta: float = 1.0,
        mean: float | list[float] = 0.5,
        std: float | list[float] = 0.25,
        visible: int | None = None,
    ):
        vit, patch, chans = encoder.model, encoder.patch_size, encoder.config["in_chans"]
        if not isinstance(vit, VisionTransformer) or encoder.has_mask_token:
            raise ValueError(
                f"encoder = {encoder.config['name']!r}: MAE takes timm's ViTs and DeiTs, created with mask_token=False"
            )
        width = decoder_width or encoder.num_features // 2
        heads = decoder_heads or max(1, width // 32)
        if width % 4 or width % heads:
            raise ValueError(f"decoder_width = {width}: must be a multiple of 4 and of the {heads} decoder_heads")
        if decoder_depth < 1:
            raise ValueError(f"decoder_depth = {decoder_depth}: must be 1 or more")
        config: dict = {"decoder_width": width, "decoder_depth": decoder_depth, "decoder_heads": heads}
        config |= {"loss": loss, "target": target, "beta": beta}
        super().__init__(encoder, create_target(target, chans, loss, beta, patch, mean, std), scope, config)
        self.visible = visible
        self.decoder_embed = nn.Linear(encoder.num_features, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        positions = sincos_positions(encoder.grid_size, width, vit.num_prefix_tokens)
        self.register_buffer("decoder_positions", positions, persistent=False)
        self.decoder_blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True) for _ in range(decoder_depth)))
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_pred = nn.Linear(width, patch**2 * self.target.channels)
        nn.init.normal_(self.mask_token, std=0.02)

    def predict(self, images: Tensor, mask: Tensor) -> Tensor:
        order = mask.flatten(1).byte().argsort(dim=1, stable=True)  # [B, N], the visible tokens first
        visible = self.visible if self.training else None
        if visible is None or mask.device.type == "cpu":  # elsewhere counting would wait for the device
            visible = count_visible(mask, visible)
        shown = order[:, :visible].unsqueeze(-1)
        latent = self.encode(images, shown)  # [B, prefix + V, D]
        x = self.decoder_embed(latent)  # [B, prefix + V, d]
        prefix, seen = x[:, : -shown.shape[1]], x[:, -shown.shape[1] :]
        tokens = self.mask_token.to(x.dtype).expand(len(x), order.shape[1], -1)
        tokens = tokens.scatter(1, shown.expand_as(seen), seen)  # [B, N, d], each visible one in its place
        x = torch.cat([prefix, tokens], 1) + self.decoder_positions
        x = self.decoder_norm(self.decoder_blocks(x))
        pixels = self.decoder_pred(x[:, prefix.shape[1] :])  # [B, N, channels * patch * patch]
        pixels = pixels.transpose(1, 2).unflatten(2, mask.shape[1:])
        return F.pixel_shuffle(pixels, self.encoder.patch_size)

    def encode(self, images: Tensor, shown: Tensor) -> Tensor:
        """images [B, C, H, W], visible tokens' numbers [B, V, 1] -> class token and those tokens [B, prefix + V, D]."""
        vit = self.encoder.model
        tokens = vit._pos_embed(vit.patch_embed(images))  # [B, prefix + N, D], positions added
        prefix = vit.num_prefix_tokens
        seen = tokens[:, prefix:].gather(1, shown.expand(-1, -1, tokens.shape[2]))
        return vit.norm(vit.blocks(vit.norm_pre(torch.cat([tokens[:, :prefix], seen], 1))))


def count_visible(mask: Tensor, expected: int | None) -> int:
    """Visible tokens of each image of a mask [B, h, w]: ``expected``, or any number above 0, the same for all.

    Raises:
        ValueError: other numbers.
    """
    counts = (~mask).flatten(1).sum(1)
    low, high = int(counts.min()), int(counts.max())
    if low != high or not low or expected not in (None, low):
        allowed = f"{expected}, as the model was told" if expected else "as many as each other image, and one or more"
        raise ValueError(
            f"mask with {low} to {high} visible tokens an image: MAE's encoder sees the visible tokens only, so that "
            f"each image must have {allowed}"
        )
    return low


def init_mae(model: MaskedImageModel) -> None:
    """The official initialisation, of encoder and decoder: Xavier uniform, biases 0; tokens normal of std 0.02.

    Also of a ``SimMIM`` on a timm ViT (else ValueError), whose 1x1 convolutions stay as they are: one start for both.
    """
    if not isinstance(model.encoder.model, VisionTransformer):
        name = model.encoder.config["name"]
        raise ValueError(f"weight_init = 'mae': the encoder must be one of timm's ViTs and DeiTs, not {name}")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    projection = model.encoder.model.patch_embed.proj.weight
    nn.init.xavier_uniform_(projection.view(len(projection), -1))
    for name, parameter in model.named_parameters():
        if name.endswith(("mask_token", "cls_token")):
            nn.init.normal_(parameter, std=0.02)
