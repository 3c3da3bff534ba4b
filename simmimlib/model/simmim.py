"""SimMIM itself (paper section 3.1, figure 1): an encoder that processes the mask tokens too, and a light head."""

from torch import Tensor

from simmimlib.model.encoders import Encoder
from simmimlib.model.heads import create_head
from simmimlib.model.mim import MaskedImageModel
from simmimlib.model.targets import create_target


class SimMIM(MaskedImageModel):
    """Predicts the hidden pixels of normalised images.

    Args:
        encoder: from ``create_encoder``, with its mask token.
        head, decoder_width, decoder_heads: kind, width and heads for ``create_head``.
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
        decoder_width: int = 0,
        decoder_heads: int = 0,
    ):
        stride = round(encoder.stride * resolution)
        if not 1 <= stride <= encoder.stride or stride != encoder.stride * resolution or encoder.stride % stride:
            whole = [f"1/{n}" for n in range(2, encoder.stride + 1) if encoder.stride % n == 0]
            raise ValueError(
                f"resolution = {resolution}: allowed with stride {encoder.stride} are 1, {', '.join(whole)}"
            )
        scored = create_target(target, encoder.config["in_chans"], loss, beta, stride, mean, std)
        config = {"head": head, "loss": loss, "target": target, "beta": beta, "resolution": resolution}
        config |= {"decoder_width": decoder_width, "decoder_heads": decoder_heads}
        super().__init__(encoder, scored, scope, config, encoder.stride // stride)
        sizes = (encoder.num_features, stride, scored.channels, encoder.grid_size)
        self.head = create_head(head, *sizes, decoder_width, decoder_heads)

    def predict(self, images: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.encoder(images, mask))  # features [B, D, H / stride, W / stride]
