"""Figures of numbers: arms, curves, accuracy over what was varied. Each function returns a matplotlib Figure."""

import time
from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from simmimlib.machine.files import whole_file
from simmimlib.machine.progress import interactive
from simmimlib.model.avgdist import avg_dist
from simmimlib.model.masking import MaskGenerator
from simmimlib.report.depth import METRICS, QUESTIONS, by_depth
from simmimlib.report.statistics import MARGIN, interval

PAPER = {"facecolor": "w", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}  # behind a text that lines would cross
MASK_QUESTIONS = ("default", "ratio", "patch", "strategy")  # whose arms differ from the default by their masks only


def save(figure: Figure, path: str | Path, runs: Iterable[str] = ()) -> None:
    """Writes a PNG whose description names the runs that it shows (``records.runs_in``)."""
    described = {"Description": " ".join(sorted(runs))} if runs else None
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150, bbox_inches="tight", metadata=described)


def curves(
    logs: dict[str, list[pd.DataFrame]], y: str, ylabel: str, title: str = "", normalise: bool = False
) -> Figure:
    """One line an arm over epochs, the mean over its logs (one data frame a seed), with their range shaded.

    ``normalise`` divides each log by its first value: arms with different losses have no common scale.
    """
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for label, frames in logs.items():
        frames = [frame.dropna(subset=[y]) for frame in frames]
        values = np.stack([frame[y] / frame[y].iloc[0] if normalise else frame[y] for frame in frames])
        epochs, about = frames[0]["epoch"], _line(label, frames, logs)
        (line,) = axis.plot(epochs, values.mean(0), marker="o" if len(epochs) < 30 else "", markersize=3, **about)
        axis.fill_between(epochs, values.min(0), values.max(0), color=line.get_color(), alpha=0.15)
    several = any(len(frames) > 1 for frames in logs.values())
    axis.set(xlabel="epoch" + " (shaded: the range over seeds)" * several, ylabel=ylabel, title=title)
    axis.xaxis.set_major_locator(FixedLocator(list(epochs)) if len(epochs) < 13 else MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    if len(logs) > 4:  # would cover lines
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    elif len(logs) > 1:
        axis.legend(fontsize=8)
    return figure


def _line(label: str, frames: list, logs: dict[str, list]) -> dict:
    """Label and style of an arm's line: that of a single seed beside means of several says so, and is dashed."""
    alone = len(frames) == 1 < max(map(len, logs.values()))
    return {"label": f"{label} (one seed)", "linestyle": "--"} if alone else {"label": label}


def _errors(rows: pd.DataFrame) -> np.ndarray:
    """Lengths of the intervals' bars below and above the means, [2, n]; 0 where one seed gives none."""
    return np.nan_to_num(np.stack([rows["mean"] - rows["low"], rows["high"] - rows["mean"]]))


def arms_beside_paper(table: pd.DataFrame, title: str = "") -> Figure:
    """Every arm's mean with its interval, the paper's numbers in a second panel.

    A line marks what the arms of a question are compared with.
    """
    means = table.groupby("arm")["mean"].first()
    table = table[~table["repeated"]]
    figure, (ours, paper) = plt.subplots(
        1, 2, figsize=(10, 0.32 * len(table) + 1.6), sharey=True, layout="constrained", width_ratios=(3, 2)
    )
    place = np.arange(len(table))[::-1]
    colours = ["tab:blue" if arm == "default" else "tab:gray" for arm in table["arm"]]
    for y, row, colour in zip(place, table.to_dict("records"), colours, strict=True):
        # an interval of two seeds is many times as wide as any other and would hide them
        bar = [[row["mean"] - row["low"]], [row["high"] - row["mean"]]] if row["seeds"] > 2 else None
        ours.errorbar(row["mean"], y, xerr=bar, fmt="o", color=colour, capsize=3)
        if row["paper"] is None or np.isnan(row["paper"]) or row["reference"] != "default":
            continue  # the paper's numbers of other references are of other models
        paper.plot(row["paper"], y, "o", color=colour)
        paper.annotate(
            f"{row['paper']:.1f}",
            (row["paper"], y),
            (6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            bbox=PAPER,
        )
    for _, rows in table.assign(place=place).groupby("question"):
        reference = rows["reference"].iloc[0]
        beside = {"ymin": rows["place"].min() - 0.4, "ymax": rows["place"].max() + 0.4, "color": "tab:blue"}
        ours.vlines(means.get(reference, []), **beside, linewidth=0.8)
        if reference == "default":
            paper.vlines(table.loc[table["arm"] == "default", "paper"], **beside, linewidth=0.8)
    ours.set_yticks(place, [f"{row.label}  (n = {row.seeds})" for row in table.itertuples()], fontsize=8)
    ours.set(xlabel="top-1, %; line: what a question compares with", title=f"{title} (95 % intervals from n = 3)")
    paper.set(xlabel="ImageNet-1K top-1, %", title="paper")
    ours.set_ylim(-0.7, len(table) - 0.3)  # matplotlib's margins grow with the number of arms
    paper.margins(x=0.25)
    paper.xaxis.set_major_locator(MaxNLocator(4))
    for axis in (ours, paper):
        axis.grid(axis="x", alpha=0.3)
    return figure


def differences_beside_paper(profiles: dict[str, list[dict]]) -> Figure:
    """Differences from the default with their joint intervals, a mark a profile, and the paper's, an arm a row.

    Args:
        profiles: of each the rows of ``statistics.compare``; arms without a difference in the paper are left out.
    """
    shown = {}
    for name, rows in profiles.items():
        own = [row for row in rows if row["reference"] == "default" and np.isfinite(row["paper_difference"])]
        if own:
            shown[name] = {row["arm"]: row for row in own}
    arms = {arm: row for of in shown.values() for arm, row in of.items()}
    place = {arm: len(arms) - i for i, arm in enumerate(arms)}
    figure, axis = plt.subplots(figsize=(8, 0.55 * len(arms) + 1.6), layout="constrained")
    axis.axvspan(-MARGIN, MARGIN, color="tab:green", alpha=0.1, label=f"no difference (±{MARGIN})")
    axis.axvline(0, color="gray", linewidth=0.8)
    for i, (name, of) in enumerate(shown.items()):
        y = [place[arm] + 0.3 - 0.6 * (i + 0.5) / len(shown) for arm in of]
        found = np.array([[row[f"difference{end}"] for end in ("", "_low", "_high")] for row in of.values()])
        bars = np.nan_to_num(np.abs(found[:, 1:] - found[:, :1]).T)
        axis.errorbar(found[:, 0], y, xerr=bars, fmt="o", markersize=5, capsize=3, label=name)
    theirs = [row["paper_difference"] for row in arms.values()]
    axis.plot(theirs, list(place.values()), "kD", fillstyle="none", label="paper (ImageNet-1K, Swin-B)")
    axis.set_yticks(list(place.values()), [row["label"] for row in arms.values()])
    axis.set(xlabel="difference from the default in top-1, points; joint 95 % intervals, from two seeds on")
    axis.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure


def paper_avg_dist(
    arms: dict[str, dict], size: int = 192, patch: int = 32, samples: int = 64
) -> list[tuple[str, float, float]]:
    """AvgDist, as a share of the image's side, and the paper's top-1 of its mask arms: (question, share, top1)."""
    found = []
    for arm in arms.values():
        if arm["question"] not in MASK_QUESTIONS or arm["paper"] is None:
            continue
        changes = {"mask_ratio": 0.6, "mask_strategy": "random", **arm["pretrain"]}
        side = round(patch * changes.get("scale", {}).get("mask_patch_size", 1))
        masks = MaskGenerator(size, side, 4, changes["mask_ratio"], changes["mask_strategy"])
        distance = avg_dist(masks(samples, torch.Generator().manual_seed(0)), 4).mean().item()
        found.append((arm["question"], distance / size, arm["paper"]))
    return found


def accuracy_over_avg_dist(table: pd.DataFrame, image_size: int, arms: dict[str, dict]) -> Figure:
    """Top-1 over AvgDist as a share of the image's side, ours beside the paper's; one point a mask arm."""
    masks = table[table["question"].isin(MASK_QUESTIONS)]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharex=True, layout="constrained")
    points = paper_avg_dist(arms)
    for question in MASK_QUESTIONS:
        group = masks[masks["question"] == question]
        if len(group):
            error = _errors(group)
            share = 100 * group["pretrain_avg_dist"] / image_size
            axes[0].errorbar(share, group["mean"], yerr=error, fmt="o", capsize=2, label=question)
        of_paper = np.array([(x, y) for name, x, y in points if name == question])
        axes[1].plot(100 * of_paper[:, 0], of_paper[:, 1], "o", label=question)
    for axis, title in zip(axes, ("ours", "paper (AvgDist measured by this library)"), strict=True):
        # the paper's best masks have an AvgDist of 10 to 20 pixels at 192
        axis.axvspan(1000 / 192, 2000 / 192, color="tab:green", alpha=0.12, label="paper's best range")
        axis.set(xlabel="AvgDist of the masks, % of the image's side", ylabel="fine-tuning top-1, %", title=title)
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=8)
    return figure


def accuracy_over_images_seen(table: pd.DataFrame) -> Figure:
    """Fine-tuning, linear probe and k-NN over the images seen in pre-training; arms that differ in length only."""
    arms = table[table["question"].isin(["default", "pretraining", "length"])].sort_values("pretrain_images_seen")
    arms = arms[~arms["repeated"]]
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    seen = arms["pretrain_images_seen"] / 1000
    error = _errors(arms)
    axis.errorbar(seen, arms["mean"], yerr=error, fmt="o-", capsize=3, label="fine-tuning (95 % interval)")
    for name, label in (("probe_linear", "linear probe"), ("probe_knn", "k-NN")):
        axis.plot(seen, arms[name], "o--", label=label)
    axis.set(xlabel="images seen in pre-training, thousands", ylabel="top-1, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def accuracy_over_depth(runs: pd.DataFrame, arms: dict[str, dict], floors: dict[str, float]) -> Figure:
    """Fine-tuning and linear probes over the blocks of SimMIM's head (0: one linear layer) and of MAE's decoder.

    Means and 95 % intervals over the seeds that all arms of a panel have, a panel for each question that has two depths
    or more; ``floors`` are drawn as dotted lines.
    """
    shown = {question: by_depth(runs, arms, question, "top1") for question in QUESTIONS}
    shown = {question: values for question, values in shown.items() if values.shape[1] > 1}
    figure, axes = plt.subplots(
        1, len(shown), figsize=(5 * len(shown), 4.2), sharey=True, layout="constrained", squeeze=False
    )
    for axis, (question, tuned) in zip(axes[0], shown.items(), strict=True):
        place = range(len(tuned.columns))  # 0, 1, 2, 4, 8: evenly spaced
        for metric, label in METRICS.items():
            values = by_depth(runs, arms, question, metric)
            middle, low, high = np.array([interval(values[depth]) for depth in values]).T
            bars = np.stack([middle - low, high - middle]) if len(values) > 2 else None
            axis.errorbar(place, middle, yerr=bars, fmt="o-" if metric == "top1" else "o--", capsize=3, label=label)
        for (label, value), style in zip(floors.items(), (":", "-."), strict=False):
            axis.axhline(value, color="k", linestyle=style, linewidth=1, label=f"{label}, {value:.1f}")
        axis.set_xticks(place, [f"{depth}" for depth in tuned.columns])
        axis.set(xlabel=f"blocks (n = {len(tuned)}; 95 % intervals from three seeds on)", title=QUESTIONS[question])
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("top-1, %")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def accuracy_over_blocks(logs: dict[str, list[pd.DataFrame]]) -> Figure:
    """Linear probe and k-NN over the encoder's blocks, 0 = its own output; label -> ``blocks.csv`` of each seed.

    Means over seeds, with their range shaded; raw pixels, where they were probed, as a dashed line.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, (probe, title) in zip(axes, {"linear": "linear probe", "knn": "k-NN"}.items(), strict=True):
        for label, frames in logs.items():
            values = pd.concat([frame.set_index("block")[probe] for frame in frames], axis=1)
            if -1 in values.index:
                floor = values.loc[-1].mean()
                axis.axhline(floor, color="k", linestyle="--", linewidth=1)
                left, beside = (0.01, floor), {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
                axis.annotate(f"raw pixels, {floor:.1f}", left, (0, 4), fontsize=8, zorder=5, bbox=PAPER, **beside)
            values = values.drop(index=-1, errors="ignore")
            if values.empty:
                continue
            # the own output is the last
            values = values.loc[[*sorted(block for block in values.index if block > 0), 0]]
            place = range(len(values))
            (line,) = axis.plot(place, values.mean(axis=1), marker="o", markersize=4, **_line(label, frames, logs))
            axis.fill_between(place, values.min(axis=1), values.max(axis=1), color=line.get_color(), alpha=0.15)
            axis.set_xticks(place, [f"{block:.0f}" if block else "output" for block in values.index])
        axis.set(xlabel="block (shaded: the range over seeds)", ylabel="top-1, %", title=title)
        axis.margins(y=0.1)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return figure


def confusion(counts: np.ndarray | pd.DataFrame, classes: list[str]) -> Figure:
    """Confusion matrix of counts [true, predicted], as shares of each true class in percent."""
    counts = np.asarray(counts)
    share = 100 * counts / counts.sum(1, keepdims=True).clip(1)
    size = min(0.45 * len(classes) + 2.2, 20)
    figure, axis = plt.subplots(figsize=(size + 0.8, size), layout="constrained")
    picture = axis.imshow(share, cmap="Blues", vmin=0, vmax=100)
    if len(classes) <= 50:
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

    def __init__(self, **columns: str):
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
