"""Pictures: masks, reconstructions, curves, arms. Each function returns a matplotlib Figure. No training code."""

import time

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import MaxNLocator

from simmimlib.batches import to_pixels
from simmimlib.masking import upsample_mask
from simmimlib.runtime import interactive, whole_file

HIDDEN = 0.5  # grey of hidden pixels


def save(figure, path) -> None:
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150, bbox_inches="tight")


def image_grid(rows: dict, size=1.3, titles=None):
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


def show(axis, image) -> None:
    """One image [H, W, C]: grey for one channel, else the first three."""
    image = np.asarray(image)
    axis.imshow(image[..., 0] if image.shape[-1] < 3 else image[..., :3], cmap="gray", vmin=0, vmax=1)
    axis.set_axis_off()


def hide(pixels, mask, patch_size: int):
    """Pixels [n, H, W, C] with the masked ones in grey; mask [n, h, w]."""
    hidden = upsample_mask(torch.as_tensor(mask), patch_size).permute(0, 2, 3, 1)
    return torch.where(hidden, HIDDEN, torch.as_tensor(pixels))


def paste(pixels, prediction, mask, patch_size: int):
    """Predicted pixels where masked, original ones where visible; all [n, H, W, C]."""
    hidden = upsample_mask(torch.as_tensor(mask), patch_size).permute(0, 2, 3, 1)
    return torch.where(hidden, torch.as_tensor(prediction), torch.as_tensor(pixels))


def reconstructions(images, mask, predictions: dict, patch_size: int, packed, whole=False):
    """Original, masked, and each model's prediction pasted into the visible pixels, in rows.

    Args:
        images: normalised [n, C, H, W]; mask: [n, h, w].
        predictions: label -> normalised prediction [n, C, H, W].
        whole: also show each prediction by itself, unpasted.
    """
    original = to_pixels(images, packed)
    rows = {"original": original, "masked": hide(original, mask, patch_size)}
    for label, prediction in predictions.items():
        pixels = to_pixels(prediction, packed)
        if whole:
            rows[f"{label}:\npredicted"] = pixels
        rows[f"{label}:\npasted into visible" if whole else label] = paste(original, pixels, mask, patch_size)
    return image_grid(rows)


def maps(values, titles: list[str], label: str):
    """Two-dimensional maps side by side on one colour scale."""
    values = [np.asarray(v) for v in values]
    low, high = min(v.min() for v in values), max(v.max() for v in values)
    figure, axes = plt.subplots(1, len(values), figsize=(3.2 * len(values) + 1, 3), layout="constrained")
    for axis, value, title in zip(axes, values, titles, strict=True):
        picture = axis.imshow(value, vmin=low, vmax=high)
        axis.set(title=title, xticks=[], yticks=[])
    figure.colorbar(picture, ax=axes, label=label)
    return figure


def curves(logs: dict, y: str, ylabel: str, title="", normalise=False):
    """One line an arm over epochs, the mean over its logs (one data frame a seed), with their range shaded.

    ``normalise`` divides each log by its first value: arms with different losses have no common scale.
    """
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for label, frames in logs.items():
        frames = [frame.dropna(subset=[y]) for frame in frames]
        values = np.stack([frame[y] / frame[y].iloc[0] if normalise else frame[y] for frame in frames])
        epochs = frames[0]["epoch"]
        (line,) = axis.plot(epochs, values.mean(0), label=label, marker="o" if len(epochs) < 30 else "", markersize=3)
        axis.fill_between(epochs, values.min(0), values.max(0), color=line.get_color(), alpha=0.15)
    axis.set(xlabel="epoch", ylabel=ylabel, title=title)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    if len(logs) > 1:
        axis.legend(fontsize=8)
    return figure


def arms_beside_paper(table, title=""):
    """Bars of every arm with its interval, the paper's numbers in a second panel."""
    figure, (ours, paper) = plt.subplots(
        1, 2, figsize=(10, 0.45 * len(table) + 1.6), sharey=True, layout="constrained", width_ratios=(3, 2)
    )
    place = np.arange(len(table))[::-1]
    colours = ["tab:blue" if arm == "default" else "tab:gray" for arm in table["arm"]]
    error = np.nan_to_num(np.stack([table["top1"] - table["low"], table["high"] - table["top1"]]))
    ours.barh(place, table["top1"], xerr=error, color=colours, capsize=3, height=0.65)
    ours.set_yticks(place, table["label"])
    ours.set(xlabel="our top-1, % (mean of seeds, 95 % interval; axis cut)", title=title)
    low, high = np.nanmin([table["low"], table["top1"]]), np.nanmax([table["high"], table["top1"]])
    ours.set_xlim(max(0, low - 0.35 * (high - low) - 1), min(100, high + 0.12 * (high - low) + 1))
    known = table["paper"].notna().to_numpy()
    hatches = ["//" if status == "recalled" else "" for status in table["paper_status"][known]]
    paper.barh(
        place[known], table["paper"][known], color=np.array(colours)[known], height=0.65, hatch=hatches, edgecolor="w"
    )
    for y, value in zip(place[known], table["paper"][known], strict=True):
        paper.text(value + 0.03, y, f"{value:.1f}", va="center", fontsize=8)
    for y in place[~known]:
        paper.text(80.55, y, "no value given", va="center", fontsize=8, color="gray")
    paper.set(xlabel="ImageNet-1K top-1, % (axis cut)", xlim=(80.5, 83.6), title="paper (hatched: unverified)")
    return figure


def accuracy_over_avg_dist(table, image_size: int):
    """Top-1 over AvgDist, one point for each arm that differs from the default by its masks only."""
    masks = table[table["question"].isin(["default", "ratio", "patch", "strategy"])]
    figure, axis = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    # the paper's best masks have an AvgDist of 10 to 20 pixels at 192: the same share of this image's side
    axis.axvspan(
        10 / 192 * image_size, 20 / 192 * image_size, color="tab:green", alpha=0.12, label="paper's best range"
    )
    for question, group in masks.groupby("question", sort=False):
        error = np.nan_to_num(np.stack([group["top1"] - group["low"], group["high"] - group["top1"]]))
        axis.errorbar(group["avg_dist"], group["top1"], yerr=error, fmt="o", capsize=2, label=question)
    axis.set(xlabel="AvgDist of the masks, pixels", ylabel="fine-tuning top-1, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def confusion(counts, classes):
    """Confusion matrix of counts [true, predicted], as shares of each true class in percent."""
    counts = np.asarray(counts)
    share = 100 * counts / counts.sum(1, keepdims=True).clip(1)
    size = 0.45 * len(classes) + 2.2
    figure, axis = plt.subplots(figsize=(size + 0.8, size), layout="constrained")
    picture = axis.imshow(share, cmap="Blues", vmin=0, vmax=100)
    axis.set_xticks(range(len(classes)), classes, rotation=90)
    axis.set_yticks(range(len(classes)), classes)
    axis.set(xlabel="predicted class", ylabel="true class")
    if len(classes) <= 20:
        for (i, j), value in np.ndenumerate(share):
            if value >= 0.5:
                axis.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=7, color="w" if value > 60 else "k")
    figure.colorbar(picture, label="share of the true class, %", shrink=0.8)
    return figure


class LiveCurve:
    """Redraws a curve in an open notebook while a loop runs: pass it as ``on_epoch``. At most one drawing a second."""

    def __init__(self, **columns):
        """``columns``: log column -> axis label, one panel each."""
        self.columns, self.handle, self.drawn = columns, None, 0.0
        if interactive():
            self.draw([])  # its place is above the progress bar, which starts after this

    def __call__(self, rows: list[dict]) -> None:
        if interactive() and time.monotonic() - self.drawn > 1:
            self.draw(rows)

    def draw(self, rows: list[dict]) -> None:
        from IPython.display import display  # imported here: the library works without IPython

        figure, axes = plt.subplots(1, len(self.columns), figsize=(5 * len(self.columns), 3), squeeze=False)
        for axis, (column, label) in zip(axes[0], self.columns.items(), strict=True):
            points = [(row["epoch"], row[column]) for row in rows if column in row]
            axis.plot(*zip(*points, strict=True), marker=".")
            axis.set(xlabel="epoch", ylabel=label)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(alpha=0.3)
        figure.tight_layout()
        if self.handle is None:
            self.handle = display(figure, display_id=True)
        else:
            self.handle.update(figure)
        plt.close(figure)
        self.drawn = time.monotonic()
