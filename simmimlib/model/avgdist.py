"""AvgDist (paper section 4.1.2): how far hidden pixels are from visible ones; the paper released no code for it."""

import torch
from torch import Tensor


def avg_dist(mask: Tensor, patch_size: int) -> Tensor:
    """AvgDist: mean Euclidean distance from a masked pixel to the nearest visible pixel, exact.

    Args:
        mask: [B, h, w], True = masked, on the token grid.
        patch_size: side of a token in pixels.

    Returns:
        [B], in pixels; 0 where nothing is masked, infinite where nothing is visible.

    The visible region is a union of tokens, so the nearest pixel of a token row or column is known in closed form
    and the search runs over tokens, not over pixels: first down each token column, then across the columns.
    """
    _, rows, cols = mask.shape
    infinity = torch.tensor(torch.inf, device=mask.device)
    down = _distance_to_patch(rows, patch_size, mask.device)  # [H, h]
    across = _distance_to_patch(cols, patch_size, mask.device)  # [W, w]
    result = []
    for visible in ~mask:  # one image at a time keeps memory at H * W * w numbers
        column = torch.where(visible, down[:, :, None], infinity).amin(1)  # [H, w]
        nearest = torch.hypot(column[:, None, :], across[None]).amin(2)  # [H, W]
        hidden = ~visible.repeat_interleave(patch_size, 0).repeat_interleave(patch_size, 1)
        result.append(nearest[hidden].mean() if hidden.any() else nearest.new_zeros(()))
    return torch.stack(result)


def _distance_to_patch(patches: int, size: int, device: torch.device) -> Tensor:
    """[patches * size, patches]: distance from each pixel to the nearest pixel of each patch, along one side."""
    pixel = torch.arange(patches * size, device=device).view(-1, 1)
    first = torch.arange(patches, device=device).view(1, -1) * size
    return torch.maximum(first - pixel, pixel - (first + size - 1)).clamp(min=0).float()
