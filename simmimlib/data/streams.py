"""Random numbers: one stream for one use, each a function of the seed and of where in the run it is drawn.

Nothing depends on what was drawn before. So a run can resume anywhere, several processes draw the same global batch and
take their share of it, a worker's picture does not depend on how many workers there are, and what two arms of one seed
have in common (initial weights, order, labelled images, classifier) is the same in both.
"""

import random

import numpy as np
import torch

ORDER, CROPS, MASKS, WORKERS, WEIGHTS, CLASSIFIER, LABELLED, STEPS = range(8)  # the uses; part of a stream's key


def random_stream(*key: int) -> torch.Generator:
    """A generator on the CPU whose numbers follow from the key: seed, use, and where in the run."""
    return torch.Generator().manual_seed(_state(key))


def seed_globals(device: torch.device, *key: int) -> None:
    """The same for what draws from the global generators: initial weights, drop path, mixup, timm's transforms."""
    state = _state(key)
    random.seed(state)
    np.random.seed(state % 2**32)  # noqa: NPY002 (timm's mixup and RandAugment draw from it)
    # torch.manual_seed would seed every kind of device, and without a GPU note a stack trace for later each time
    torch.default_generator.manual_seed(state)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(state)


def _state(key: tuple[int, ...]) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
