import math

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt

from simmimlib.model.avgdist import avg_dist
from simmimlib.model.masking import STRATEGIES, MaskGenerator, upsample_mask


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_avg_dist_is_the_exact_distance_transform(strategy, generator):
    mask = MaskGenerator((96, 128), 16, 4, 0.6, strategy)(6, generator)
    pixels = upsample_mask(mask, 4)[:, 0].numpy()
    expected = [distance_transform_edt(image)[image].mean() for image in pixels]
    np.testing.assert_allclose(avg_dist(mask, 4), expected, rtol=1e-5)


def test_avg_dist_at_the_ends():
    nothing, everything = torch.zeros(1, 4, 4, dtype=torch.bool), torch.ones(1, 4, 4, dtype=torch.bool)
    assert avg_dist(nothing, 8).item() == 0 and avg_dist(everything, 8).item() == math.inf
