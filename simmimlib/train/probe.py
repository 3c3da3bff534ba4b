"""Probes (paper section 4.2): k nearest neighbours, or a linear classifier, read the class off frozen features."""

import time
from collections.abc import Collection
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from simmimlib.data.batches import Batches, validation_batches
from simmimlib.data.packed import Packed, Split, labelled_subset, open_packed
from simmimlib.data.streams import WEIGHTS, seed_globals
from simmimlib.machine.device import pick_device, resolve_precision
from simmimlib.machine.distributed import launch, local_shard, rank, sum_over_ranks
from simmimlib.machine.files import check_writable, write_csv, write_json
from simmimlib.machine.provenance import provenance
from simmimlib.model.encoders import blocks_of
from simmimlib.settings import require
from simmimlib.train.classifiers import fit_linear, weighted_vote
from simmimlib.train.features import check_block, extract
from simmimlib.train.settings import ProbeSettings
from simmimlib.weights.export import export_timm

PIXELS = -1  # in place of a block's number: the raw pixels, the floor under every encoder
PIXELS_SIDE = 32  # to which larger images are averaged for it


def knn(settings: ProbeSettings) -> dict:
    """Classifies by the k nearest training images, as DINO does; writes ``knn.json``. Uses every GPU there is.

    Returns:
        The metrics; ``top1`` is in percent, ``labelled_images`` the training images used, ``features`` the dimension.

    Raises:
        ValueError: a block the encoder lacks, more neighbours than training images, a set without validation images
            or without two classes.
    """
    return launch(_knn, settings)


def linear_probe(settings: ProbeSettings) -> dict:
    """Fits a linear classifier (``fit_linear``); writes ``linear_probe.json``. Uses every GPU for the features.

    The solver is scikit-learn's L-BFGS, on one CPU with all features in memory: no learning rate has to be found.

    Returns:
        The metrics, as of ``knn``; ``C`` is the chosen inverse strength of the regularisation.

    Raises:
        ValueError: as ``knn`` does; a class with a single training image.
    """
    return launch(_linear_probe, settings)


def probe_blocks(settings: ProbeSettings) -> dict:
    """k-NN and linear probe of every block; ``settings.block`` has no say.

    Writes ``blocks.csv``, a row a block (0 = the encoder's own output, -1 = raw pixels, averaged
    to at most 32 by 32), and ``metrics.json``.

    Returns:
        The metrics: ``knn`` and ``linear`` of the encoder's own output, ``*_best`` and ``*_best_block`` of the best
        block, with ``settings.raw_pixels`` also ``*_pixels``; in percent.
    """
    return launch(_probe_blocks, settings)


def _knn(settings: ProbeSettings, on_epoch: None = None) -> dict:
    frozen = _Frozen(settings, [settings.block])
    own = {"k": settings.k, "temperature": settings.temperature}
    return frozen.write("knn.json", {"top1": frozen.knn(settings.block), **frozen.about(settings.block), **own})


def _linear_probe(settings: ProbeSettings, on_epoch: None = None) -> dict:
    frozen = _Frozen(settings, [settings.block], fewest=2)
    top1, strength = frozen.linear(settings.block)
    return frozen.write("linear_probe.json", {"top1": top1, **frozen.about(settings.block), "C": strength})


def _probe_blocks(settings: ProbeSettings, on_epoch: None = None) -> dict:
    frozen, rows = _Frozen(settings, None, fewest=2), []
    for block in sorted(frozen.train):
        linear, strength = frozen.linear(block)
        rows.append({**frozen.about(block), "knn": frozen.knn(block), "linear": linear, "C": strength})
        if rank() == 0:
            print(f"probe block {block}: k-NN {rows[-1]['knn']:.2f}, linear {linear:.2f}", flush=True)
    metrics: dict[str, float] = {}
    for probe in ("knn", "linear"):
        of = {row["block"]: row[probe] for row in rows}
        best = max((block for block in of if block > 0), key=lambda block: of[block])
        metrics |= {probe: of[0], f"{probe}_best": of[best], f"{probe}_best_block": best}
        if PIXELS in of:
            metrics[f"{probe}_pixels"] = of[PIXELS]
    if rank() == 0:
        write_csv(Path(settings.out) / "blocks.csv", rows)
    return frozen.write("metrics.json", metrics)


class _Frozen:
    """The features of one encoder on one data set, in every process, and what is asked of them.

    Args:
        blocks: which to read; None reads all, and with ``settings.raw_pixels`` the pixels in place of one more.
        fewest: training images that each class must have.
    """

    def __init__(self, settings: ProbeSettings, blocks: Collection[int] | None, fewest: int = 1):
        self.settings, self.start = settings, time.perf_counter()
        self.data, self.split = _labelled(settings)
        count, rarest = len(self.split), np.unique(self.split.labels, return_counts=True)[1].min()
        name, value = "labelled_images", settings.labelled_images
        require(rarest >= fewest, name, value, "enough for two images of each class or more")
        require(settings.k <= count, "k", settings.k, f"at most {count}, the number of training images")
        self.device = pick_device()
        self.dtype = resolve_precision(settings.precision, self.device)
        seed_globals(self.device, settings.seed, WEIGHTS)
        model = export_timm(settings.start(self.data.channels), image_size=settings.image_size).to(self.device)
        check_block(model, settings.block)
        check_writable(settings.out)
        # the others wait while the first process fits: on the CPU, where no watchdog stops them
        self.group = dist.new_group(backend="gloo", timeout=timedelta(days=1)) if dist.is_initialized() else None
        wanted = range(len(blocks_of(model)) + 1) if blocks is None else blocks
        splits = (self.split, self.data.val)
        self.train, self.val = (extract(model, self._batches(split), self.dtype, wanted) for split in splits)
        if blocks is None and settings.raw_pixels:
            self.train[PIXELS], self.val[PIXELS] = (self._pixels(split) for split in splits)

    def _batches(self, split: Split) -> Batches:
        settings = self.settings
        cut = {"crop_pct": settings.crop_pct, "interpolation": settings.interpolation}
        return validation_batches(
            split,
            self.data,
            settings.image_size,
            settings.batch_size,
            self.device,
            **cut,  # type: ignore[arg-type]
        )

    def _pixels(self, split: Split) -> Tensor:
        batches = self._batches(split)
        side = min(self.settings.image_size, PIXELS_SIDE)
        found = torch.zeros(len(split), self.data.channels * side**2, device=self.device)
        for rows, (images, _) in zip(batches.rows(0), batches, strict=True):
            found[local_shard(rows).to(self.device)] = adaptive_avg_pool2d(images, side).flatten(1)
        return sum_over_ranks(found)

    def knn(self, block: int) -> float:
        """Top-1 in percent."""
        train, val = self.train[block], self.val[block]
        labels, truth = (torch.from_numpy(np.array(s.labels)).to(self.device) for s in (self.split, self.data.val))
        predicted = weighted_vote(train, labels, local_shard(val), self.settings.k, self.settings.temperature)
        return 100 * sum_over_ranks((predicted == local_shard(truth)).sum()).item() / len(val)

    def linear(self, block: int) -> tuple[float, float]:
        """Top-1 in percent, and the chosen C."""
        result: list = [None]
        if rank() == 0:
            train, val = (features[block].cpu().numpy() for features in (self.train, self.val))
            classifier, strength = fit_linear(train, np.array(self.split.labels), self.settings.seed)
            result = [(100 * float((classifier.predict(val) == self.data.val.labels).mean()), strength)]
        if self.group:
            dist.broadcast_object_list(result, group=self.group)  # type: ignore[arg-type]
        return result[0]

    def about(self, block: int) -> dict:
        return {"block": block, "features": self.train[block].shape[1]}

    def write(self, name: str, numbers: dict) -> dict:
        """Adds where the numbers come from, writes them, and returns all."""
        metrics = numbers | {"labelled_images": len(self.split), "seed": self.settings.seed}
        metrics |= {"data": self.data.name, "data_digest": self.data.digest, **provenance(self.device, self.dtype)}
        metrics["wall_seconds"] = time.perf_counter() - self.start
        if rank() == 0:
            write_json(Path(self.settings.out) / name, metrics)
        return metrics


def _labelled(settings: ProbeSettings) -> tuple[Packed, Split]:
    """The data set, and those of its training images that are used."""
    data = open_packed(settings.data)
    require(len(data.val) > 0, "data", settings.data, "a set with validation images (val/ or test/)")
    require(len(np.unique(data.train.labels)) > 1, "data", settings.data, "a set with two classes or more")
    if not settings.labelled_images:
        return data, data.train
    return data, data.train.select(labelled_subset(data.train.labels, settings.labelled_images, settings.seed))
