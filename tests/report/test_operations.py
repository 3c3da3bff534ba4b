import pytest

from simmimlib.report.operations import forward_operations
from simmimlib.train.settings import PretrainSettings

VIT = {"patch_size": 4, "embed_dim": 64, "depth": 3, "num_heads": 4}


def operations(**changes):
    values = {"encoder_kwargs": VIT, "image_size": 32, "mask_patch_size": 4, "mask_ratio": 0.75}
    settings = PretrainSettings(**values | changes)
    model = settings.model()
    return forward_operations(model, settings.masks(model.encoder.patch_size))


def test_a_vits_operations_are_those_of_the_formula():
    """Twelve D x D products a token and block, attention's two of tokens x D, patch embedding and head of 48 values."""
    tokens, width = 65, 64
    blocks = 3 * (12 * tokens * width**2 + 2 * tokens**2 * width)
    assert operations() == 2 * (blocks + 2 * 64 * 48 * width)


def test_mae_costs_less_and_a_deeper_decoder_more():
    shallow, deep = operations(method="mae"), operations(method="mae", decoder_depth=4)
    assert shallow < 0.5 * operations() and shallow < deep
    tokens, width = 65, 32
    block = 12 * tokens * width**2 + 2 * tokens**2 * width
    assert deep - shallow == pytest.approx(2 * 3 * block)
