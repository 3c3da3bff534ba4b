"""SimMIM itself (paper section 3.1, figure 1): encoder, head and loss put together."""

from typing import NamedTuple

from torch import Tensor, nn

from simmimlib.heads import create_head
from simmimlib.losses import LOSSES, SCOPES, pixel_errors, scoped_mean
from simmimlib.masking import upsample_mask

TARGETS = ("pixels",)


class SimMIMOutput(NamedTuple):
    loss: Tensor  # scalar
    prediction: Tensor  # [B, C, H, W], normalised pixels


class SimMIM(nn.Module):
    """Predicts the hidden pixels of normalised images.

    Args:
        encoder: from ``create_encoder``.
        head: a name for ``create_head``.
        loss: ``"l1"`` (the paper's), ``"l2"`` or ``"smooth_l1"``.
        scope: ``"masked"`` scores the hidden pixels only, ``"all"`` the whole image (table "predict or reconstruct").
        target: what is predicted; ``"pixels"``.
        beta: where smooth-L1 turns from quadratic to linear.

    Raises:
        ValueError: an unknown name.
    """

    def __init__(self, encoder, head="linear", loss="l1", scope="masked", target="pixels", beta=1.0):
        super().__init__()
        for name, value, allowed in (("loss", loss, LOSSES), ("scope", scope, SCOPES), ("target", target, TARGETS)):
            if value not in allowed:
                raise ValueError(f"{name} = {value!r}: allowed are {', '.join(allowed)}")
        self.encoder = encoder
        self.head = create_head(head, encoder.num_features, encoder.stride, encoder.config["in_chans"])
        self.loss, self.scope, self.beta = loss, scope, beta
        self.config = {"head": head, "loss": loss, "scope": scope, "target": target, "beta": beta}

    def forward(self, images: Tensor, mask: Tensor) -> SimMIMOutput:
        """images [B, C, H, W], mask [B, h, w] on the token grid (True = hidden)."""
        features = self.encoder(images, mask)  # [B, D, H / stride, W / stride]
        prediction = self.head(features)  # [B, C, H, W]
        errors = pixel_errors(prediction.float(), images, self.loss, self.beta)
        loss = scoped_mean(errors, upsample_mask(mask, self.encoder.patch_size), self.scope)
        return SimMIMOutput(loss, prediction)
