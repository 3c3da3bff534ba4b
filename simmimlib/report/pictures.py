"""Pictures of images: grids, masks, reconstructions, maps. Each function returns a matplotlib Figure."""

from collections.abc import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from simmimlib.data.packed import Packed
from simmimlib.data.packed_images import to_pixels
from simmimlib.model.masking import upsample_mask

HIDDEN = 0.5  # grey of hidden pixels


def image_grid(
    rows: Mapping[str, np.ndarray | Tensor], size: float = 1.3, titles: Sequence[str] | None = None
) -> Figure:
    """Images in labelled rows: ``{label: [n, H, W, C] pixels in [0, 1]}``; the first three channels are shown."""
    columns = max(len(images) for images in rows.values())
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(size * columns + 1.2, size * len(rows)), squeeze=False, layout="constrained"
    )
    for line, (label, images) in zip(axes, rows.items(), strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, image in zip(line, np.asarray(images), strict=False):
            show(axis, image)
        line[0].text(-0.08, 0.5, label, transform=line[0].transAxes, ha="right", va="center", fontsize=9)
    for axis, title in zip(axes[0], titles or [], strict=False):
        axis.set_title(title, fontsize=9)
    return figure


def show(axis: Axes, image: np.ndarray | Tensor) -> None:
    """One image [H, W, C]: grey for one channel, else the first three."""
    image = np.asarray(image)
    axis.imshow(image[..., 0] if image.shape[-1] < 3 else image[..., :3], cmap="gray", vmin=0, vmax=1)
    axis.set_axis_off()


def hide(pixels: np.ndarray | Tensor, mask: np.ndarray | Tensor, patch_size: int) -> Tensor:
    """Pixels [n, H, W, C] with the masked ones in grey; mask [n, h, w]."""
    hidden = upsample_mask(torch.as_tensor(mask), patch_size).permute(0, 2, 3, 1)
    return torch.where(hidden, HIDDEN, torch.as_tensor(pixels))


def paste(
    pixels: np.ndarray | Tensor, prediction: np.ndarray | Tensor, mask: np.ndarray | Tensor, patch_size: int
) -> Tensor:
    """Predicted pixels where masked, original ones where visible; all [n, H, W, C]."""
    hidden = upsample_mask(torch.as_tensor(mask), patch_size).permute(0, 2, 3, 1)
    return torch.where(hidden, torch.as_tensor(prediction), torch.as_tensor(pixels))


def reconstructions(
    images: Tensor, mask: Tensor, predictions: dict[str, Tensor], patch_size: int, packed: Packed, whole: bool = False
) -> Figure:
    """Original, masked, and each model's prediction pasted into the visible pixels, in rows.

    Args:
        images: normalised [n, C, H, W]; mask: [n, h, w].
        predictions: label -> normalised prediction [n, C, H, W].
        whole: also show each prediction by itself, unpasted.
    """
    original, rows = to_pixels(images, packed), {}
    for label, prediction in predictions.items():
        pixels = to_pixels(prediction, packed)
        if whole:
            rows[f"{label}:\npredicted"] = pixels
        rows[f"{label}:\npasted into visible" if whole else label] = paste(original, pixels, mask, patch_size)
    return beside_original(original, mask, patch_size, rows)


def beside_original(original: Tensor, mask: Tensor, patch_size: int, rows: Mapping[str, np.ndarray | Tensor]) -> Figure:
    """Rows of images below the original ones and what of them is visible; all pixels [n, H, W, C], mask [n, h, w]."""
    return image_grid({"original": original, "masked": hide(original, mask, patch_size), **rows})


def maps(values: Iterable[np.ndarray | Tensor], titles: list[str], label: str) -> Figure:
    """Two-dimensional maps side by side on one colour scale."""
    values = [np.asarray(v) for v in values]
    low, high = min(v.min() for v in values), max(v.max() for v in values)
    figure, axes = plt.subplots(1, len(values), figsize=(3.2 * len(values) + 1, 3), layout="constrained")
    for axis, value, title in zip(axes, values, titles, strict=True):
        picture = axis.imshow(value, vmin=low, vmax=high)
        axis.set(title=title, xticks=[], yticks=[])
    figure.colorbar(picture, ax=axes, label=label)
    return figure
