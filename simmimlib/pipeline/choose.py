"""Chooses the values of a profile for a folder of images, each with its reason."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch

from simmimlib.model.avgdist import avg_dist
from simmimlib.model.masking import MaskGenerator
from simmimlib.pipeline.budget import EVALUATIONS, Runs
from simmimlib.pipeline.look import Look

SEEDS = 3
FEW_VALIDATED = 200  # images: a standard error of 3.5 points
VALIDATION = 2000  # images: one standard error of a top-1 of 50 % is then 1.1 points
PROBED = 500  # labelled images of the probes; with raw pixels they take longer than a short run
EPOCHS = 800  # the paper's longest pre-training
FINETUNE_EPOCHS = (20, 100)  # fewest with fewer labelled images, most
LABELS_A_CLASS = 2  # fewest: the linear probe holds one of them out
BEST_AVG_DIST = 0.065  # of the side: the middle of the 5 to 8 % of the paper's best masks
# of pre-training
FEWEST_STEPS = 500  # below, nothing can come of it
HELPED_STEPS = 1500  # with which `quick` gained its 2 points
ENOUGH_STEPS = 4700  # with which `cifar10-cpu` gained its 5 points
FEWEST_IMAGES = 4000  # on which it did


@dataclass(frozen=True)
class Recipe:
    """How an encoder is trained: learning rates at its rung's batch, and what else the profile's ``finetune`` holds."""

    rate: float
    finetune_rate: float
    finetune: dict
    origin: str


@dataclass(frozen=True)
class Rung:
    """An encoder, and the images that it is for."""

    encoder: str
    encoder_kwargs: dict
    tokens: int  # along a side
    sizes: tuple[int, ...]  # of the image; the largest that is not above the images' shorter side
    least: int  # shorter side of the images
    batch: int
    recipe: Recipe

    def model(self, side: int) -> dict:
        """The profile's section for images of this shorter side."""
        size = max((size for size in self.sizes if size <= side), default=min(self.sizes))
        patch = {"patch_size": size // self.tokens} if self.encoder == VIT else {}
        return {"encoder": self.encoder, "encoder_kwargs": {**patch, **self.encoder_kwargs}, "image_size": size}


VIT = "vit_tiny_patch16_224"
SWIN = "swin_tiny_patch4_window7_224"
LARGE = Recipe(5e-4, 5e-4, {"layer_decay": 0.8, "drop_path": 0.1, "crop_scale": 0.35}, "a recipe that was not run yet")
SMALL = Recipe(4e-3, 2e-3, {"layer_decay": 1.0, "crop_scale": 0.67}, "the rates of cifar10-cpu")
LADDER = (
    Rung(SWIN, {"window_size": 6}, 48, (192,), 160, 256, LARGE),
    Rung(VIT, {"embed_dim": 192, "depth": 12, "num_heads": 3}, 12, (96,), 80, 256, LARGE),
    Rung(VIT, {"embed_dim": 192, "depth": 9, "num_heads": 3}, 8, (64, 32), 0, 256, LARGE),
    Rung(VIT, {"embed_dim": 64, "depth": 3, "num_heads": 4}, 8, (64, 32), 0, 64, SMALL),
    Rung(VIT, {"embed_dim": 64, "depth": 2, "num_heads": 4}, 6, (48, 30), 0, 32, SMALL),
)


@dataclass
class Choice:
    """A profile in the making: values by section, a reason for ``section.name``, and warnings."""

    look: Look
    values: dict = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    minutes: float = 0.0  # that everything takes, by what was measured

    def put(self, section: str, name: str, value: object, why: str = "") -> None:
        self.values.setdefault(section, {})[name] = value
        if why:
            self.why[f"{section}.{name}"] = why

    @property
    def runs(self) -> Runs:
        return Runs(SEEDS if self.look.labelled else 1, self.look.labelled)

    @property
    def training_counts(self) -> np.ndarray:
        """Of each class, as packed."""
        data = self.values["data"]
        limit = data.get("train_per_class", 0) or self.look.counts.max()
        return np.minimum(self.look.counts - data.get("holdout_per_class", 0), limit)

    @property
    def validated(self) -> int:
        """Validation images, as packed."""
        data, classes = self.values["data"], max(1, len(self.look.source.classes))
        if held := data.get("holdout_per_class", 0):
            return held * classes
        counts = self.look.validation_counts
        return int(np.minimum(counts, data.get("val_per_class", 0) or counts.max()).sum())


def rungs(look: Look) -> Iterator[Rung]:
    """For images of these sizes, the largest first."""
    return (rung for rung in LADDER if rung.least <= look.side)


@cache
def best_masks(image_size: int, patch_size: int) -> tuple[int, float, float]:
    """Mask patch, ratio and AvgDist as a share of the side: the pair nearest to ``BEST_AVG_DIST``.

    Mask patches of a twelfth to a quarter of the side (the paper's 32 of 192 pixels is a sixth), ratios 0.4 to 0.7.
    """
    found = []
    for mask_patch in (patch_size * 2**power for power in range(6)):
        if image_size % mask_patch or not image_size <= 12 * mask_patch <= 3 * image_size:
            continue
        for ratio in (0.4, 0.5, 0.6, 0.7):
            masks = MaskGenerator(image_size, mask_patch, patch_size, ratio)
            share = avg_dist(masks(16, torch.Generator().manual_seed(0)), patch_size).mean().item() / image_size
            found.append((abs(share - BEST_AVG_DIST), mask_patch, ratio, share))
    _, mask_patch, ratio, share = min(found)
    return mask_patch, ratio, share


def choose_data(choice: Choice, images: str, image_size: int) -> None:
    """What to pack: everything but validation images beyond what a comparison needs.

    Raises:
        ValueError: a class has too few images.
    """
    look = choice.look
    classes = max(1, len(look.source.classes))
    choice.put("data", "data", "folder")
    choice.put("data", "path", str(Path(images).expanduser().absolute()))
    stored = min(look.side, image_size * 7 // 6) if look.side > image_size else image_size
    why = f"the images' shorter side is {look.side} (median)" + ", and crops are not enlarged" * (stored > image_size)
    choice.put("data", "size", stored, why)
    choice.put("data", "channels", look.channels, look.told_kinds())
    means = "of ImageNet, as in the paper" if look.channels == 3 else "of these images: ImageNet's are for RGB"
    choice.put("data", "statistics", "imagenet" if look.channels == 3 else "dataset", means)
    kept, rarest = max(1, VALIDATION // classes), int(look.counts.min())
    if not look.source.val:
        held = min(max(1, rarest // 5), kept)
        choice.put("data", "holdout_per_class", held, "there is no val/ or test/: so many training images validate")
    elif look.validation_counts.max() > kept:
        choice.put("data", "val_per_class", kept, "their standard error is a point or so; 0 takes all, and longer")
    if look.labelled and choice.training_counts.min() < LABELS_A_CLASS:
        counts = dict(zip(look.source.classes, choice.training_counts, strict=True))
        few = [name for name, count in counts.items() if count < LABELS_A_CLASS]
        raise ValueError(
            f"images = {images!r}: {len(few)} classes have fewer than {LABELS_A_CLASS} training images"
            f"{' beside one to validate on' if not look.source.val else ''} ({', '.join(few[:10])}); take them out"
        )
    if look.unreadable:
        choice.put("data", "corrupt", "stop", "skip leaves unreadable images out and lists them")


def choose_model(choice: Choice, rung: Rung) -> None:
    """Encoder and masks, and the parts of the recipe that do not depend on the time there is."""
    model = rung.model(choice.look.side)
    size, patch = model["image_size"], model["image_size"] // rung.tokens
    for name, value in model.items():
        choice.put("model", name, value)
    why = f"the largest that gets {ENOUGH_STEPS} steps here, or the smallest; {rung.recipe.origin}"
    choice.why["model.encoder"] = why
    choice.why["model.image_size"] = f"{rung.tokens} x {rung.tokens} patches of {patch} pixels"
    mask_patch, ratio, share = best_masks(size, patch)
    choice.put("pretrain", "mask_patch_size", mask_patch)
    why = f"AvgDist is {100 * share:.1f} % of the side; the paper's masks at 82.8 and above have 5 to 8 %"
    choice.put("pretrain", "mask_ratio", ratio, why)


def choose_recipe(choice: Choice, rung: Rung, pretrain_images: float, finetune_images: float) -> None:
    """Epochs, batches, rates and the labelled part, for so many images of pre-training and of a fine-tuning."""
    classes, counts = max(1, len(choice.look.source.classes)), choice.training_counts
    epochs = pretrain_images / counts.sum()
    if epochs < 3 and 0 < (limit := int(pretrain_images / np.ceil(epochs) / classes)) < counts.max():
        choice.put("data", "train_per_class", limit, "so many can be seen in the time; 0 takes all")
        epochs, counts = np.ceil(epochs), choice.training_counts
    epochs = min(EPOCHS, max(1, int(epochs)))
    batch = fitting_batch(rung.batch, int(counts.sum()))
    _choose_training(choice, "pretrain", epochs, batch, rung.recipe.rate * batch / rung.batch, warmup=0.08)
    choice.why["pretrain.epochs"] = f"{steps_of(choice)} steps: what fits into the minutes, at most {EPOCHS} epochs"
    choice.put("pretrain", "crop_scale", 0.67, "as in the paper")
    choice.put("pretrain", "flip", True, "false where left and right mean something, as of letters")
    if not choice.look.labelled:
        choice.values["finetune"] = {}
        return
    fewest, most = FINETUNE_EPOCHS
    each = max(LABELS_A_CLASS, min(int(counts.min()), int(finetune_images / fewest / classes)))
    # all of them, too, where a rare class would leave most labels out
    everything = counts.sum() * fewest <= finetune_images or 2 * each * classes * fewest <= finetune_images
    labelled = 0 if everything else each * classes
    used = labelled or int(counts.sum())
    said = f"all {used}" if not labelled else f"{each} a class: what {fewest} epochs allow in the time; 0 takes all"
    choice.put("finetune", "labelled_images", labelled, said)
    epochs = min(most, max(1, int(finetune_images / used)))
    batch = fitting_batch(rung.batch, used)
    _choose_training(choice, "finetune", epochs, batch, rung.recipe.finetune_rate * batch / rung.batch, warmup=0.1)
    for name, value in rung.recipe.finetune.items():
        choice.put("finetune", name, value)
    choice.put("finetune", "flip", True)
    choice.put("finetune", "eval_epochs", max(1, epochs // EVALUATIONS))
    probed = min(int(counts.min()), max(LABELS_A_CLASS, PROBED // classes)) * classes
    choice.put("probe", "labelled_images", probed, "equally many a class, for features that are not trained")
    choice.put("probe", "k", min(20, probed))


def _choose_training(choice: Choice, section: str, epochs: int, batch: int, rate: float, warmup: float) -> None:
    choice.put(section, "epochs", epochs)
    choice.put(section, "batch_size", batch)
    choice.put(section, "base_lr", float(f"{rate * 512 / batch:.4g}"), f"a rate of {rate:.2g} at this batch")
    # where the warm-up starts and the cosine ends
    low = 1e-4 if rate > 1e-3 else 1e-6
    choice.put(section, "base_warmup_lr", low)
    choice.put(section, "base_min_lr", low)
    choice.put(section, "warmup_epochs", round(warmup * epochs, 2))


def fitting_batch(most: int, images: int) -> int:
    """A power of two: at least four steps an epoch."""
    return max(2, min(most, 2 ** int(np.log2(max(2, images / 4)))))


def steps_of(choice: Choice) -> int:
    pretrain = choice.values["pretrain"]
    return pretrain["epochs"] * int(choice.training_counts.sum() // pretrain["batch_size"])


def warn(choice: Choice) -> None:
    """Where pre-training cannot help, and what is odd about the images."""
    look, steps, count = choice.look, steps_of(choice), int(choice.training_counts.sum())
    say = choice.warnings.append
    if count < FEWEST_IMAGES:
        say(
            f"{count} training images are few: the smallest set on which this project saw pre-training help has "
            f"{FEWEST_IMAGES} (quick). Expect little or nothing from these alone"
        )
    if look.labelled and choice.validated < FEW_VALIDATED:
        say(
            f"{choice.validated} validation images tell little: the standard error of an accuracy is up to "
            f"{50 / choice.validated**0.5:.0f} points; put more into val/<class>/"
        )
    if steps < HELPED_STEPS:
        say(
            f"{steps} steps of pre-training are few: quick gained 2 points in {HELPED_STEPS}, and a published run that "
            "was too short lost 8 (CIFAR-10, 20 epochs, 59.1 to 50.9). Give more minutes"
        )
    elif steps < 10_000:
        say(f"{steps} steps of pre-training: published gains of nine points and more took about 10,000 steps")
    if look.duplicates:
        pairs = f"{look.duplicates[0][0]} is {look.duplicates[0][1]}"
        say(
            f"{len(look.duplicates)} of {look.compared} validation images are in the training set byte for byte "
            f"({pairs}): accuracy on them is remembered; take them out of one of the two"
        )
    if look.unreadable:
        say(
            f"{len(look.unreadable)} of {look.decoded} images looked at cannot be read, and packing will stop at them: "
            f"mend or remove them, or set `corrupt: skip` ({'; '.join(look.unreadable[:3])})"
        )
    width, height = np.median(look.sizes, 0)
    if max(width, height) > 2 * min(width, height):
        say(f"images of {width:.0f} x {height:.0f}: validation sees the square in their middle only")
    size = choice.values["model"]["image_size"]
    if look.side < size:
        say(f"images with a shorter side of {look.side} pixels are enlarged to {size}")
    missing = len(look.source.classes) - len({label for _, label in look.source.val})
    if look.labelled and look.source.val and missing:
        say(f"{missing} of {len(look.source.classes)} classes have no validation image: nothing is said about them")
