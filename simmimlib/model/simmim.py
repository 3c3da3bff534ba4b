"""SimMIM itself (paper section 3.1, figure 1): encoder, head, target and loss put together."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from simmimlib.model.encoders import Encoder
from simmimlib.model.heads import create_head
from simmimlib.model.masking import upsample_mask
from simmimlib.model.targets import SCOPES, create_target, scoped_mean


class SimMIMOutput(NamedTuple):
    """What a forward pass gives; ``prediction`` is worked out when it is asked for, which training never does."""

    loss: Tensor  # scalar
    raw: Tensor  # [B, target channels, resolution * H, resolution * W], what the head gave
    images: Tensor  # [B, C, H, W]
    model: "SimMIM"

    @property
    def prediction(self) -> Tensor:
        """Predicted normalised pixels [B, C, H, W], whatever the target; low resolutions are repeated."""
        size = self.images.shape[2:]
        pixels = self.model.target.pixels(self.raw.float(), self.model.downsample(self.images))
        return pixels if pixels.shape[2:] == size else F.interpolate(pixels, size)


class SimMIM(nn.Module):
    """Predicts the hidden pixels of normalised images.

    Args:
        encoder: from ``create_encoder``.
        head: a name for ``create_head``.
        loss: of the pixel targets: ``"l1"`` (the paper's), ``"l2"`` or ``"smooth_l1"``.
        scope: ``"masked"`` scores the hidden pixels only, ``"all"`` the whole image.
        target: a name for ``create_target``.
        beta: where smooth-L1 turns from quadratic to linear.
        resolution: side of the predicted image as a share of the input's, 1/stride ... 1; the target is averaged down.
        mean, std: what images are normalised with (numbers or one per channel); the colour bins need them.

    Raises:
        ValueError: an unknown name, or a resolution that gives no whole number of pixels.
    """

    def __init__(
        self,
        encoder: Encoder,
        head: str = "linear",
        loss: str = "l1",
        scope: str = "masked",
        target: str = "pixels",
        beta: float = 1.0,
        resolution: float = 1.0,
        mean: float | list[float] = 0.5,
        std: float | list[float] = 0.25,
    ):
        super().__init__()
        if scope not in SCOPES:
            raise ValueError(f"scope = {scope!r}: allowed are {', '.join(SCOPES)}")
        stride = round(encoder.stride * resolution)
        if not 1 <= stride <= encoder.stride or stride != encoder.stride * resolution or encoder.stride % stride:
            whole = [f"1/{n}" for n in range(2, encoder.stride + 1) if encoder.stride % n == 0]
            raise ValueError(
                f"resolution = {resolution}: allowed with stride {encoder.stride} are 1, {', '.join(whole)}"
            )
        in_chans = encoder.config["in_chans"]
        self.encoder = encoder
        self.target = create_target(target, in_chans, loss, beta, stride, mean, std)
        self.head = create_head(head, encoder.num_features, stride, self.target.channels, encoder.grid_size)
        self.scope, self.downsampling = scope, encoder.stride // stride
        self.config = {"head": head, "loss": loss, "scope": scope, "target": target, "beta": beta}
        self.config["resolution"] = resolution

    def forward(self, images: Tensor, mask: Tensor) -> SimMIMOutput:
        """images [B, C, H, W], mask [B, h, w] on the token grid (True = hidden)."""
        features = self.encoder(images, mask)  # [B, D, H / stride, W / stride]
        raw = self.head(features)  # [B, target channels, H / downsampling, W / downsampling]
        errors = self.target.errors(raw.float(), self.downsample(images))
        pixel_mask = self.downsample(upsample_mask(mask, self.encoder.patch_size).float())
        return SimMIMOutput(scoped_mean(errors, pixel_mask, self.scope), raw, images, self)

    def downsample(self, images: Tensor) -> Tensor:
        """To the predicted resolution, each pixel the mean of those it covers."""
        return F.avg_pool2d(images, self.downsampling) if self.downsampling > 1 else images
