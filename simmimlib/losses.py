"""The regression losses over masked pixels or over all pixels (paper section 3.5, equation 1).

The mean is taken over the masked pixels of the whole *batch*, as the official code does, not over each image first;
``1e-5`` in the denominator is the official guard against an empty mask.
"""

import torch.nn.functional as F
from torch import Tensor

LOSSES = ("l1", "l2", "smooth_l1")
SCOPES = ("masked", "all")


def pixel_errors(prediction: Tensor, target: Tensor, loss: str, beta: float = 1.0) -> Tensor:
    """Error of each value, [B, C, H, W]; ``beta`` is where smooth-L1 turns from quadratic to linear."""
    if loss == "l1":
        return (prediction - target).abs()
    if loss == "l2":
        return (prediction - target).square()
    if loss == "smooth_l1":
        return F.smooth_l1_loss(prediction, target, reduction="none", beta=beta)
    raise ValueError(f"loss = {loss!r}: allowed are {', '.join(LOSSES)}")


def scoped_mean(errors: Tensor, pixel_mask: Tensor, scope: str) -> Tensor:
    """Mean of ``errors`` [B, C, H, W] over the masked pixels of ``pixel_mask`` [B, 1, H, W], or over all pixels."""
    if scope == "all":
        return errors.mean()
    if scope != "masked":
        raise ValueError(f"scope = {scope!r}: allowed are {', '.join(SCOPES)}")
    pixel_mask = pixel_mask.to(errors.dtype)
    return (errors * pixel_mask).sum() / (pixel_mask.sum() + 1e-5) / errors.shape[1]
