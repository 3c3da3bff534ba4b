import random
from itertools import product

import numpy as np
import torch

from simmimlib.data import streams
from simmimlib.data.streams import random_stream, seed_globals

USES = ("ORDER", "CROPS", "MASKS", "WORKERS", "WEIGHTS", "CLASSIFIER", "LABELLED", "STEPS")


def draw(*key):
    return tuple(torch.rand(4, generator=random_stream(*key)).tolist())


def test_a_stream_follows_from_its_key_alone():
    first = draw(3, streams.CROPS, 1, 2)
    torch.rand(100), draw(4, streams.CROPS, 1, 2)
    assert draw(3, streams.CROPS, 1, 2) == first


def test_every_part_of_the_key_counts():
    keys = list(product(range(3), range(8), range(3), range(3)))  # seed, use, epoch, step
    assert len({draw(*key) for key in keys}) == len(keys)
    assert len({draw(0, getattr(streams, use)) for use in USES}) == len(USES), "each use has a stream of its own"


def test_seeding_the_global_generators_seeds_all_three():
    def numbers(*key):
        seed_globals(torch.device("cpu"), *key)
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    assert numbers(1, 2) == numbers(1, 2)
    assert all(a != b for a, b in zip(numbers(1, 2), numbers(1, 3), strict=True))


def test_torchs_global_numbers_are_those_of_the_stream():
    seed_globals(torch.device("cpu"), 5, streams.WEIGHTS)
    assert tuple(torch.rand(4).tolist()) == draw(5, streams.WEIGHTS)
