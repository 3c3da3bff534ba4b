"""Frozen features (paper section 4.2): what an encoder knows before it is fine-tuned.

The encoder sees whole images and is not trained; k nearest neighbours, or a linear classifier, read the class off its
features. They are the mean of the patch tokens: the loss is on these alone, not on a class token, and a Swin has none.
The paper's linear probe of ViT-B (56.7 % on ImageNet) reads the 8th of its 12 blocks: ``block = 8``.
"""

import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.utils import random_seed
from torch import Tensor, nn

from simmimlib.batches import INTERPOLATIONS, Batches, validation_batches
from simmimlib.checkpoints import export_timm, load_simmim
from simmimlib.data import Packed, Split, labelled_subset, open_packed
from simmimlib.encoders import create_encoder
from simmimlib.launch import launch
from simmimlib.runtime import (
    PRECISIONS,
    autocast,
    check_writable,
    pick_device,
    provenance,
    rank,
    resolve_precision,
    share,
    sum_over_ranks,
    write_json,
)
from simmimlib.settings import Settings, one_of, require

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # C of scikit-learn, the inverse of the regularisation's strength
SIMILARITIES = 2**26  # held at a time: 256 MB


@dataclass
class ProbeSettings(Settings):
    """Settings of ``knn`` and ``linear_probe``.

    ``checkpoint`` is the ``model.safetensors`` of a pre-training; empty, for comparison, an untrained encoder made of
    ``encoder``, ``encoder_kwargs`` and ``seed``. ``labels`` training images are used (0 = all, otherwise those that
    ``finetune`` takes with this seed). ``block`` says whose output is read: blocks count from 1, in a Swin over all
    stages; 0 is the encoder's own output, after the last block and the final norm. ``k`` and ``temperature`` belong to
    ``knn``. ``batch_size`` counts images over all devices.
    """

    data: str = "mnist5k"
    checkpoint: str = ""
    encoder: str = "vit_tiny_patch16_224"
    encoder_kwargs: dict = field(default_factory=lambda: {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4})
    image_size: int = 32
    labels: int = 0
    block: int = 0
    k: int = 20
    temperature: float = 0.07
    batch_size: int = 500
    interpolation: str = "bilinear"
    val_crop: float = 1.0
    precision: str = "auto"
    seed: int = 0
    out: str = "results/try/probe"

    def check(self):
        one_of("interpolation", self.interpolation, INTERPOLATIONS)
        one_of("precision", self.precision, PRECISIONS)
        for name in ("k", "temperature", "batch_size"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in ("labels", "block", "seed"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(0 < self.val_crop <= 1, "val_crop", self.val_crop, "above 0 and at most 1")
        if not self.checkpoint:
            with torch.device("meta"):
                cut_after(create_encoder(self.encoder, self.image_size, **self.encoder_kwargs).model, self.block)
        elif not Path(self.checkpoint).is_file():
            raise ValueError(f"checkpoint = {self.checkpoint!r}: there is no such file (empty = from scratch)")

    def model(self, in_chans: int) -> nn.Module:
        """The encoder as a timm model in evaluation mode; it ends with the block whose output is read."""
        if self.checkpoint:
            encoder = load_simmim(self.checkpoint).encoder
            require(encoder.config["in_chans"] == in_chans, "data", self.data, "of the checkpoint's channel count")
        else:
            encoder = create_encoder(self.encoder, self.image_size, in_chans, **self.encoder_kwargs)
        return cut_after(export_timm(encoder, image_size=self.image_size), self.block).eval()


def knn(settings: ProbeSettings) -> dict:
    """Classifies by the k nearest training images, as DINO does; writes ``knn.json``. Uses every GPU (``launch.py``).

    Returns:
        The metrics; ``top1`` is in percent, ``labels`` the training images used, ``features`` the dimension.

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


def _knn(settings: ProbeSettings, on_epoch=None) -> dict:
    start = time.perf_counter()
    data, split = _labelled(settings)
    count = len(split.images)
    require(settings.k <= count, "k", settings.k, f"at most {count}, the number of training images")
    train, val, origin = _features(settings, data, split)
    labels, truth = (torch.from_numpy(np.array(part.labels)).to(train.device) for part in (split, data.val))
    predicted = weighted_vote(train, labels, share(val), settings.k, settings.temperature)
    right = sum_over_ranks((predicted == share(truth)).sum()).item()
    metrics = {"top1": 100 * right / len(val), "k": settings.k, "temperature": settings.temperature, **origin}
    return _write(settings, "knn", metrics, start)


def _linear_probe(settings: ProbeSettings, on_epoch=None) -> dict:
    start = time.perf_counter()
    data, split = _labelled(settings)
    rarest = np.unique(split.labels, return_counts=True)[1].min()
    require(rarest > 1, "labels", settings.labels, "enough for two images of each class or more")
    # the others wait while the first process fits: on the CPU, where no watchdog stops them
    group = dist.new_group(backend="gloo", timeout=timedelta(days=1)) if dist.is_initialized() else None
    train, val, origin = _features(settings, data, split)
    result = [None]
    if rank() == 0:
        classifier, strength = fit_linear(train.cpu().numpy(), np.array(split.labels), settings.seed)
        right = (classifier.predict(val.cpu().numpy()) == data.val.labels).sum().item()
        result = [_write(settings, "linear_probe", {"top1": 100 * right / len(val), "C": strength, **origin}, start)]
    if group:
        dist.broadcast_object_list(result, group=group)
    return result[0]


def _labelled(settings: ProbeSettings) -> tuple[Packed, Split]:
    """The data set, and those of its training images that are used."""
    data = open_packed(settings.data)
    require(len(data.val.images) > 0, "data", settings.data, "a set with validation images (val/ or test/)")
    require(len(np.unique(data.train.labels)) > 1, "data", settings.data, "a set with two classes or more")
    if not settings.labels:
        return data, data.train
    generator = torch.Generator().manual_seed(settings.seed)
    return data, data.train.select(labelled_subset(data.train.labels, settings.labels, generator))


def _features(settings: ProbeSettings, data: Packed, split: Split) -> tuple[Tensor, Tensor, dict]:
    """Features of the training and of all validation images, and what the metrics say about where they come from."""
    check_writable(settings.out)
    device = pick_device()
    dtype = resolve_precision(settings.precision, device)
    random_seed(settings.seed)
    model = settings.model(data.channels).to(device)
    sizes = (settings.image_size, settings.batch_size)
    cut = {"centre": settings.val_crop, "interpolation": settings.interpolation}
    train, val = (
        extract(model, validation_batches(part, data, *sizes, device, **cut), dtype) for part in (split, data.val)
    )
    origin = {"labels": len(train), "block": settings.block, "features": train.shape[1], "data": data.name}
    return train, val, {**origin, "seed": settings.seed, **provenance(device, dtype)}


def _write(settings: ProbeSettings, name: str, metrics: dict, start: float) -> dict:
    metrics["wall_seconds"] = time.perf_counter() - start
    if rank() == 0:
        write_json(Path(settings.out) / f"{name}.json", metrics)
    return metrics


# Features ------------------------------------------------------------------------------------------------------------


def cut_after(model: nn.Module, block: int) -> nn.Module:
    """Takes away what follows a block, the final norm included; 0 leaves all. Changes ``model`` and returns it.

    timm's own ``forward_intermediates`` counts the stages of a Swin, not its blocks.

    Raises:
        ValueError: there is no such block.
    """
    stages = getattr(model, "layers", [model])  # a Swin's stages; a ViT has its blocks itself
    blocks = [(number, i) for number, stage in enumerate(stages) for i in range(len(stage.blocks))]
    allowed = f"from 1 to {len(blocks)}, the encoder's blocks, or 0 for its own output"
    require(0 <= block <= len(blocks), "block", block, allowed)
    if block:
        number, last = blocks[block - 1]
        stages[number].blocks = stages[number].blocks[: last + 1]
        if number + 1 < len(stages):
            model.layers = stages[: number + 1]
        model.norm = nn.Identity()
    return model


def mean_tokens(model: nn.Module, images: Tensor) -> Tensor:
    """images [B, C, H, W] -> mean of the patch tokens that the timm model ends with [B, D], float32."""
    tokens = model.forward_features(images)  # [B, prefix + N, D] (ViT) or [B, h, w, D] (Swin)
    tokens = tokens[:, model.num_prefix_tokens :] if tokens.ndim == 3 else tokens.flatten(1, 2)
    return tokens.float().mean(1)


@torch.inference_mode()
def extract(model: nn.Module, batches: Batches, dtype: torch.dtype) -> Tensor:
    """Features [N, D] of all images, in the order of their split, float32, on the device and in every process."""
    features = None
    for rows, (images, _) in zip(batches.rows(0), batches, strict=True):
        # Of several processes one may have no share of the last batch, or of the only one; but it has to know D.
        with autocast(batches.device, dtype):
            mean = mean_tokens(model, images if len(images) else images.new_zeros(1, *images.shape[1:]))
        if features is None:
            features = mean.new_zeros(len(batches.labels), mean.shape[1])
        features[share(rows).to(batches.device)] = mean[: len(images)]
    return sum_over_ranks(features)  # each process fills in the rows of its share; the others are zero


# Classifiers ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def weighted_vote(train: Tensor, labels: Tensor, queries: Tensor, k: int, temperature: float) -> Tensor:
    """The class of each query: its k nearest training images by cosine vote, each with exp(cosine / temperature).

    train [N, D], labels [N], queries [M, D] -> [M]. Memory does not grow with N x M.
    """
    train, queries = F.normalize(train, dim=1), F.normalize(queries, dim=1)
    predicted = [labels[:0]]
    for part in queries.split(max(1, SIMILARITIES // len(train))):
        cosines, nearest = (part @ train.T).topk(k)  # [m, k], the nearest first
        weights = ((cosines - cosines[:, :1]) / temperature).exp()  # in units of the nearest one's: no overflow
        votes = weights.new_zeros(len(part), int(labels.max()) + 1).scatter_add_(1, labels[nearest], weights)
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)


def fit_linear(features: np.ndarray, labels: np.ndarray, seed: int):
    """Logistic regression on standardised features [N, D] and labels [N]: the classifier and its C.

    C is the one of ``STRENGTHS`` that does best on a held-out tenth of these (training) images, the strongest of equal
    ones; then all are fitted. No validation image has a say. Each class needs two images.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # by class, so that each tenth image holds out of all
    held = np.isin(np.arange(len(labels)), order[::10])

    def fit(strength, rows):
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
        return classifier.fit(features[rows], labels[rows])

    scores = [fit(strength, ~held).score(features[held], labels[held]) for strength in STRENGTHS]
    best = STRENGTHS[int(np.argmax(scores))]
    return fit(best, slice(None)), best
