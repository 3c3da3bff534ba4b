"""Prediction heads (paper section 3.4): from the encoder's feature map back to pixels."""

from torch import nn

HEADS = ("linear",)


def create_head(kind, in_features, stride, out_chans=3) -> nn.Module:
    """A head [B, in_features, h, w] -> [B, out_chans, h * stride, w * stride].

    ``"linear"``: one 1x1 convolution to stride * stride * out_chans channels (3072 for Swin's stride 32 and RGB), laid
    out as pixels by a pixel shuffle.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in HEADS:
        raise ValueError(f"head = {kind!r}: allowed are {', '.join(HEADS)}")
    return nn.Sequential(nn.Conv2d(in_features, stride**2 * out_chans, kernel_size=1), nn.PixelShuffle(stride))
