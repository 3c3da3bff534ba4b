import math
from collections import Counter

import pytest
import torch

from simmimlib.model.avgdist import avg_dist
from simmimlib.model.masking import STRATEGIES, MaskGenerator, upsample_mask


def test_official_count(generator):
    """22 of 36 patches at 192 pixels, patch 32, ratio 0.6 (official code: ceil)."""
    mask = MaskGenerator(192)(16, generator)
    assert mask.shape == (16, 48, 48) and mask.dtype == torch.bool
    assert (mask.sum((1, 2)) == 22 * 64).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("patch", [4, 16, 32])
@pytest.mark.parametrize("ratio", [0.001, 0.11, 0.4, 0.6, 0.9, 1.0])
def test_count_and_alignment(strategy, patch, ratio, generator):
    mask = MaskGenerator(192, patch, 4, ratio, strategy)(8, generator)
    patches = (192 // patch) ** 2
    assert (mask.sum((1, 2)) == math.ceil(patches * ratio) * (patch // 4) ** 2).all()
    blocks = mask.unfold(1, patch // 4, patch // 4).unfold(2, patch // 4, patch // 4).flatten(3)
    assert (blocks.all(3) == blocks.any(3)).all(), "a mask patch is hidden whole or not at all"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_reproducible_and_different(strategy):
    masks = MaskGenerator(192, 32, 4, 0.25, strategy)
    first, again = (masks(32, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, masks(32, torch.Generator().manual_seed(8)))
    assert len(first.flatten(1).unique(dim=0)) > 8, "images of one batch get masks of their own"


@pytest.mark.parametrize(("ratio", "side"), [(0.11, 64), (0.25, 96), (0.44, 128)])
def test_square_is_the_papers(ratio, side, generator):
    mask = upsample_mask(MaskGenerator(192, 32, 4, ratio, "square")(20, generator), 4)[:, 0]
    for image in mask:
        rows, cols = image.any(1).nonzero(), image.any(0).nonzero()
        assert rows.max() - rows.min() + 1 == side and cols.max() - cols.min() + 1 == side
        assert image.sum() == side * side


def test_random_is_uniform(generator):
    share = MaskGenerator(64, 16, 16, 0.5)(4000, generator).float().mean(0)
    assert (share - 0.5).abs().max() < 0.05


def test_blocks_are_coarser_than_random(generator):
    """Block-wise masks leave larger holes at the same ratio: their AvgDist is larger."""
    blocks, single = (
        avg_dist(MaskGenerator(192, 16, 16, 0.4, s)(64, generator), 16).mean() for s in ("block", "random")
    )
    assert blocks > 1.5 * single


def test_rectangular_images(generator):
    for strategy in STRATEGIES:
        mask = MaskGenerator((64, 160), 16, 4, 0.5, strategy)(4, generator)
        assert mask.shape == (4, 16, 40) and (mask.sum((1, 2)) == 20 * 16).all()


@pytest.mark.parametrize(
    ("grid", "count", "box"),
    [((6, 6), 9, (3, 3)), ((6, 6), 10, (4, 3)), ((3, 10), 16, (3, 6)), ((10, 2), 10, (5, 2)), ((2, 10), 10, (2, 5))],
)
def test_a_square_that_is_none_leaves_the_end_of_its_last_row(grid, count, box, generator):
    """On grids that are too narrow it becomes a rectangle."""
    masks = MaskGenerator((grid[0] * 4, grid[1] * 4), 4, 4, count / (grid[0] * grid[1]), "square")(20, generator)
    for mask in masks:
        rows, cols = mask.any(1).nonzero(), mask.any(0).nonzero()
        inside = mask[rows.min() : rows.max() + 1, cols.min() : cols.max() + 1]
        assert inside.shape == box and inside.flatten()[:count].all() and inside.sum() == count == mask.sum()


def test_a_square_may_be_anywhere(generator):
    masks = MaskGenerator((20, 16), 4, 4, 4 / 20, "square")(6000, generator)  # 2 x 2 of 5 x 4
    places, counts = masks.flatten(1).unique(dim=0, return_counts=True)
    assert len(places) == 4 * 3 and (counts / 6000 - 1 / 12).abs().max() < 0.02


def test_blocks_are_rectangles_of_beits_sizes_and_shapes(generator):
    """At least 4 patches each, up to about three times as long as wide, either way."""
    boxes = Counter()
    for mask in MaskGenerator(48, 4, 4, 4 / 144, "block")(2000, generator):  # 4 of 12 x 12: most are one rectangle
        rows, cols = mask.any(1).nonzero(), mask.any(0).nonzero()
        boxes[(rows.max() - rows.min() + 1).item(), (cols.max() - cols.min() + 1).item()] += 1
    assert 0.36 < boxes[2, 2] / 2000 < 0.52  # log-uniform aspect: 42 % and what two rectangles make by chance
    assert boxes[1, 4] / 2000 > 0.02 and boxes[4, 1] / 2000 > 0.02
    assert sum(count for (height, width), count in boxes.items() if height * width == 4) / 2000 > 0.45


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 100}, "image_size = 100: must be a multiple of mask_patch_size = 32"),
        ({"image_size": 192, "mask_patch_size": 6}, "mask_patch_size = 6: must be a multiple of the model's patch"),
        ({"image_size": 192, "ratio": 0}, "ratio = 0: must be above 0 and at most 1"),
        ({"image_size": 192, "ratio": 1.5}, "ratio = 1.5"),
        ({"image_size": 192, "strategy": "stripes"}, "strategy = 'stripes': allowed are random, square, block"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError) as error:
        MaskGenerator(**arguments)
    assert message in str(error.value)
