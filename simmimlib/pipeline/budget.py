"""How long `make repro` takes on this machine, and what fits into so many minutes."""

import heapq
from dataclasses import dataclass

FILLED = 0.85  # of the minutes: what was measured in seconds does not hold exactly for an hour
TABLES = 40.0  # seconds of the pipeline's last stage and of finding out what is to do, on two slow cores
DVC = 6.0  # seconds of a run's own `dvc repro`, there
PRETRAINING = 2 / 3  # of a seed's training; the two fine-tunings share the rest
EVALUATIONS = 4  # of a fine-tuning


@dataclass(frozen=True)
class Cost:
    """Seconds on this machine: to pack the set, to train on an image, and around the training of each stage."""

    packing: float
    pretrain_image: float
    finetune_image: float
    evaluation: float  # on all validation images
    starts: float  # of the notebooks of a run, all together
    probe: float
    probe_pixels: float  # of the arm from scratch, besides
    jobs: int  # runs side by side


@dataclass(frozen=True)
class Runs:
    """What `make repro` is to train, with each seed: the default and, of a set with classes, from scratch."""

    seeds: int
    labelled: bool

    def seconds(self, cost: Cost, pretrain_images: float, finetune_images: float) -> float:
        """Of everything, when the default is pre-trained on so many images and each arm fine-tuned on so many."""
        around = cost.starts + DVC
        tuned = around + cost.probe + finetune_images * cost.finetune_image + EVALUATIONS * cost.evaluation
        default, scratch = tuned + pretrain_images * cost.pretrain_image, tuned + cost.probe_pixels
        if not self.labelled:
            return cost.packing + TABLES + default
        return cost.packing + TABLES + makespan([default] * self.seeds + [scratch] * self.seeds, cost.jobs)

    def minutes(self, cost: Cost, pretrain_images: float, finetune_images: float) -> float:
        """To ask for, so that so much fits."""
        return self.seconds(cost, pretrain_images, finetune_images) / 60 / FILLED

    def fit(self, cost: Cost, minutes: float) -> tuple[float, float]:
        """Images of pre-training and of a fine-tuning, (0, 0) if nothing fits."""
        low, high = 0.0, 60 * minutes * cost.jobs  # seconds of a seed's training
        for _ in range(50):
            middle = (low + high) / 2
            fits = self.minutes(cost, *self.images(cost, middle)) <= minutes
            low, high = (middle, high) if fits else (low, middle)
        return self.images(cost, low)

    def images(self, cost: Cost, seconds: float) -> tuple[float, float]:
        """The same for so many seconds of training with each seed."""
        if not self.labelled:
            return seconds / cost.pretrain_image, 0.0
        rest = (1 - PRETRAINING) / 2 * seconds
        return PRETRAINING * seconds / cost.pretrain_image, rest / cost.finetune_image


def makespan(seconds: list[float], jobs: int) -> float:
    """Of tasks that are started in this order as soon as one of ``jobs`` places is free."""
    free = [0.0] * jobs
    for task in seconds:
        heapq.heappush(free, heapq.heappop(free) + task)
    return max(free)
