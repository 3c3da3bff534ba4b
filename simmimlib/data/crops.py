"""Crops (paper section 4.1): random resized crops and centre crops of whole batches, on the device."""

import torch
import torch.nn.functional as F
from torch import Tensor

ASPECT_RATIO = (3 / 4, 4 / 3)
INTERPOLATIONS = ("bilinear", "bicubic")


def random_resized_boxes(sizes: Tensor, smallest: float, generator: torch.Generator, tries: int = 10) -> Tensor:
    """Crop boxes drawn as torchvision's RandomResizedCrop draws them.

    Args:
        sizes: [B, 2], width and height of the original images in pixels.
        smallest: smallest share of the area; the largest is 1.

    Returns:
        [B, 4]: left, top, right, bottom as shares of width and height.

    Area is uniform, aspect ratio log-uniform; the first of ten draws that fits is taken, otherwise the largest centre
    crop whose aspect ratio is allowed. Sides and corners are whole pixels of the original image.
    """
    width, height = sizes[:, :1], sizes[:, 1:]
    uniform = torch.rand(4, len(sizes), tries, generator=generator)
    area = width * height * (smallest + (1 - smallest) * uniform[0])
    low, high = torch.tensor(ASPECT_RATIO, dtype=torch.float64).log().tolist()
    aspect = torch.exp(low + (high - low) * uniform[1])
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.float().argmax(1, keepdim=True)
    w, h, u_left, u_top = (t.gather(1, first)[:, 0] for t in (w, h, uniform[2], uniform[3]))
    width, height = width[:, 0], height[:, 0]
    left, top = (u_left * (width - w + 1)).floor(), (u_top * (height - h + 1)).floor()
    centre_w = torch.minimum(width, (height * ASPECT_RATIO[1]).round())
    centre_h = torch.minimum(height, (width / ASPECT_RATIO[0]).round())
    none = ~fits.any(1)
    w, h = torch.where(none, centre_w, w), torch.where(none, centre_h, h)
    left = torch.where(none, ((width - w) / 2).floor(), left)
    top = torch.where(none, ((height - h) / 2).floor(), top)
    return torch.stack([left / width, top / height, (left + w) / width, (top + h) / height], 1)


def centre_boxes(sizes: Tensor, crop_pct: float) -> Tensor:
    """[B, 4]: the centred square whose side is ``crop_pct`` of the shorter side, as shares of width and height."""
    half = sizes.amin(1, keepdim=True) * crop_pct / sizes / 2
    return torch.cat([0.5 - half, 0.5 + half], 1)


def flip(boxes: Tensor, flipped: Tensor) -> Tensor:
    """Exchanges left and right of the boxes [B, 4] where ``flipped`` [B] says so."""
    return torch.where(flipped[:, None], boxes[:, [2, 1, 0, 3]], boxes)


def crop(images: Tensor, boxes: Tensor, size: int, interpolation: str = "bilinear") -> Tensor:
    """Cuts a box out of each image and resizes it, in one batched call. Not antialiased, as ``resize`` is.

    images [B, C, H, W] in [0, 255], boxes [B, 4] (left, top, right, bottom as shares of the side; left and right
    exchanged = flipped) -> [B, C, size, size].
    """
    if not len(images):  # of several processes one may have no share of the last batch
        return images.new_zeros(0, images.shape[1], size, size)
    left, top, right, bottom = boxes.unbind(1)
    zero = torch.zeros_like(left)
    theta = torch.stack(
        [
            torch.stack([right - left, zero, right + left - 1], 1),
            torch.stack([zero, bottom - top, bottom + top - 1], 1),
        ],
        1,
    )  # [B, 2, 3]: from output coordinates in [-1, 1] to input coordinates in [-1, 1]
    grid = F.affine_grid(theta, [len(images), images.shape[1], size, size], align_corners=False)
    cropped = F.grid_sample(images, grid, mode=interpolation, padding_mode="border", align_corners=False)
    return cropped.clamp_(0, 255) if interpolation == "bicubic" else cropped  # which overshoots


def resize(images: Tensor, size: int, interpolation: str = "bilinear") -> Tensor:
    """Whole images [B, C, H, W] in [0, 255] -> [B, C, size, size], antialiased."""
    return F.interpolate(images, (size, size), mode=interpolation, antialias=True).clamp(0, 255)
