"""What masked image models share (paper figure 1): pixels are predicted from a masked image and scored by a target."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from simmimlib.model.encoders import Encoder
from simmimlib.model.masking import check_mask, upsample_mask
from simmimlib.model.targets import SCOPES, BinTarget, ClusterTarget, PixelTarget, scoped_mean


class Output(NamedTuple):
    """What a forward pass gives; ``prediction`` is worked out when it is asked for, which training never does."""

    loss: Tensor  # scalar
    raw: Tensor  # [B, target channels, H / downsampling, W / downsampling], what the model predicted
    images: Tensor  # [B, C, H, W]
    model: "MaskedImageModel"

    @property
    def prediction(self) -> Tensor:
        """Predicted normalised pixels [B, C, H, W], whatever the target; low resolutions are repeated."""
        size = self.images.shape[2:]
        pixels = self.model.target.pixels(self.raw.float(), self.model.downsample(self.images))
        return pixels if pixels.shape[2:] == size else F.interpolate(pixels, size)


class MaskedImageModel(nn.Module):
    """Predicts the hidden pixels of normalised images. ``SimMIM``, ``MAE`` and ``FCMAE`` say how (``predict``).

    Args:
        encoder: from ``create_encoder``.
        target: from ``create_target``.
        scope: ``"masked"`` scores the hidden pixels only, ``"all"`` the whole image.
        downsampling: how many pixels of a side go into one predicted pixel.
        config: what rebuilds the model besides the encoder's own, for checkpoints.

    Raises:
        ValueError: an unknown scope.
    """

    def __init__(
        self,
        encoder: Encoder,
        target: PixelTarget | BinTarget | ClusterTarget,
        scope: str,
        config: dict,
        downsampling: int = 1,
    ):
        super().__init__()
        if scope not in SCOPES:
            raise ValueError(f"scope = {scope!r}: allowed are {', '.join(SCOPES)}")
        self.encoder, self.target = encoder, target
        self.scope, self.config, self.downsampling = scope, config | {"scope": scope}, downsampling

    def predict(self, images: Tensor, mask: Tensor) -> Tensor:
        """images [B, C, H, W], mask [B, h, w] -> [B, target channels, H / downsampling, W / downsampling]."""
        raise NotImplementedError

    def forward(self, images: Tensor, mask: Tensor) -> Output:
        """images [B, C, H, W], mask [B, h, w] on the token grid (True = hidden).

        Raises:
            ValueError: a mask of another shape.
        """
        check_mask(mask, images, self.encoder.patch_size)
        raw = self.predict(images, mask)
        errors = self.target.errors(raw.float(), self.downsample(images))
        pixel_mask = self.downsample(upsample_mask(mask, self.encoder.patch_size).float())
        return Output(scoped_mean(errors, pixel_mask, self.scope), raw, images, self)

    def downsample(self, images: Tensor) -> Tensor:
        """To the predicted resolution, each pixel the mean of those it covers."""
        return F.avg_pool2d(images, self.downsampling) if self.downsampling > 1 else images
