"""What the tour and the notebook on use start from: the trained model that git keeps, pictures that need no data."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT
from simmimlib.data.packed_images import to_pixels
from simmimlib.model.masking import MaskGenerator
from simmimlib.report.tour import TRAINED, TourSettings, photograph, small_pictures
from simmimlib.report.use import UseSettings
from simmimlib.weights.card import Origin, model_card
from simmimlib.weights.checkpoints import load_model


@pytest.fixture(autouse=True)
def in_project(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_small_pictures_are_crops_of_both_photographs():
    packed, images = small_pictures(32)
    assert images.shape == (18, 3, 32, 32)
    pixels = to_pixels(images, packed)
    whole = [
        torch.tensor(np.array(photograph(f"{name}.jpg"))).float().mean((0, 1)) / 255 for name in ("china", "flower")
    ]
    for mean, part in zip(whole, pixels.split(9), strict=True):
        torch.testing.assert_close(part.mean((0, 1, 2)), mean, rtol=0, atol=0.06)  # the margin on the right is cut off


def test_the_picture_of_the_tour_is_cut_to_a_square(tmp_path):
    packed, images = TourSettings(image_size=64, mask_patch_size=32, encoder_kwargs={"window_size": 2}).load_picture()
    assert images.shape == (1, 3, 64, 64) and packed.size == 64


def test_the_tour_needs_tokens():
    with pytest.raises(ValueError, match="encoder = 'convnextv2_atto': must be a ViT, DeiT, BEiT, Swin or"):
        TourSettings(encoder="convnextv2_atto", encoder_kwargs={})


def test_the_trained_model_that_git_keeps_has_learnt_something():
    assert os.path.getsize(TRAINED) < 1e6  # noqa: PTH202
    model = load_model(TRAINED).eval()
    _, images = small_pictures(32)
    mask = MaskGenerator(32, 8, 4, 0.6)(len(images), torch.Generator().manual_seed(0))
    with torch.inference_mode():
        loss = model(images, mask).loss
    hidden = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand_as(images)
    # guessing each picture's mean colour, the hidden part of it included
    guess = (images - images.mean((2, 3), keepdim=True)).abs()[hidden].mean()
    assert loss < 0.8 * guess


def test_the_card_of_these_weights_follows_from_their_run():
    folder = (ROOT / TRAINED).parent
    assert (folder.parent / "README.md").read_text() == model_card(load_model(TRAINED), Origin.read(folder))


def test_use_refuses_a_checkpoint_that_is_not_there():
    assert UseSettings().weights.name == "model.safetensors"
    with pytest.raises(
        ValueError, match=r"checkpoint = 'none.safetensors': must be a model.safetensors of 02_pretrain"
    ):
        UseSettings(checkpoint="none.safetensors")
    with pytest.raises(ValueError, match="epochs = 0: must be above 0"):
        UseSettings(epochs=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["00_tour", "06_use"])
def test_notebooks_that_no_stage_runs(name, tmp_path):
    values = {"00_tour": ["seed", "1"], "06_use": ["epochs", "1", "-p", "out", str(tmp_path / "use")]}[name]
    command = [
        sys.executable,
        "-m",
        "papermill",
        "-k",
        "python3",
        f"notebooks/{name}.ipynb",
        str(tmp_path / "out.ipynb"),
    ]
    subprocess.run([*command, "--no-progress-bar", "-p", *values], check=True)
