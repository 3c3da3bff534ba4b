"""Numbers of other code: the official one's (tests/golden) and Hugging Face's."""

import json
import logging

import numpy as np
import pytest
import torch

from simmimlib.model.encoders import create_encoder
from simmimlib.model.masking import MaskGenerator
from simmimlib.model.simmim import SimMIM
from simmimlib.weights.checkpoints import load_checkpoint
from simmimlib.weights.formats import to_simmimlib
from small_models import OFFICIAL, build_official, golden, hugging_face

CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_numbers(name, tmp_path):
    """Features, reconstruction, loss and every gradient's norm, from the official weights in the official wrapping."""
    numbers = {key: torch.from_numpy(value) for key, value in np.load(golden(f"official_{name}_tiny.npz")).items()}
    state = {key.removeprefix("state/"): value for key, value in numbers.items() if key.startswith("state/")}
    torch.save({"model": state}, tmp_path / "official.pth")
    model = load_checkpoint(tmp_path / "official.pth", build_official(name))
    output = model(numbers["images"], numbers["mask"])
    features = model.encoder(numbers["images"], numbers["mask"])
    torch.testing.assert_close(features, numbers["features"], **CLOSE)
    torch.testing.assert_close(output.prediction, numbers["reconstruction"], **CLOSE)
    torch.testing.assert_close(output.loss, numbers["loss"], **CLOSE)
    output.loss.backward()
    norms = {key.removeprefix("gradnorm/"): value for key, value in numbers.items() if key.startswith("gradnorm/")}
    _, expected = to_simmimlib(norms)
    assert expected.keys() == {name for name, _ in model.named_parameters()}
    actual = {name: parameter.grad.norm() for name, parameter in model.named_parameters()}
    for key, norm in expected.items():
        torch.testing.assert_close(actual[key], norm, rtol=1e-4, atol=1e-7, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(
    ("key", "encoder", "size", "kwargs"),
    [
        ("swin_base_img192_window6", "swin_base_patch4_window7_224", 192, {"window_size": 6}),
        ("vit_base_img224", "simmim_vit_base", 224, {}),
    ],
)
def test_official_names_and_shapes(key, encoder, size, kwargs, caplog):
    shapes = json.loads(golden("official_checkpoint_keys.json").read_text())[key]
    state = {name: torch.rand(()).expand(shape) for name, shape in shapes.items()}
    model = SimMIM(create_encoder(encoder, size, **kwargs))
    caplog.set_level(logging.INFO, "simmimlib")
    load_checkpoint({"model": state}, model)
    derived = [name for name in shapes if name.endswith(("relative_position_index", "attn_mask"))]
    count = len(shapes) - len(derived)
    assert f"placed {count} of {count} tensors; dropped as derived: {len(derived)} (" in caplog.text
    assert not any(word in caplog.text for word in ("resized", "left out", "new"))
    assert torch.equal(model.head[0].weight, state["decoder.0.weight"])
    if "swin" in encoder:
        moved = model.encoder.model.layers[1].downsample.reduction.weight
        assert torch.equal(moved, state["encoder.layers.0.downsample.reduction.weight"])


@pytest.mark.parametrize("form", ["state dict", "folder", "safetensors", "bin"])
@pytest.mark.parametrize("name", ["swin", "plain vit"])
def test_hugging_face_numbers(name, form, tmp_path):
    """Files and, from transformers 5 on, models in memory spell the same weights differently."""
    theirs = hugging_face(name)
    source = {"state dict": theirs.state_dict(), "folder": tmp_path}.get(form, tmp_path / "model.safetensors")
    theirs.save_pretrained(tmp_path)
    if form == "bin":
        source = tmp_path / "pytorch_model.bin"
        torch.save(theirs.state_dict(), source)
    ours = load_checkpoint(source, build_official(name))
    images = torch.randn(2, 3, 64, 64)
    mask = MaskGenerator(64, 32, ours.encoder.patch_size)(2, torch.Generator().manual_seed(0))
    mask[0] = False
    mask[0, 0, 0] = True  # images with different numbers of masked pixels: both take the mean over the batch
    with torch.no_grad():
        expected, output = theirs(images, bool_masked_pos=mask.flatten(1)), ours(images, mask)
    torch.testing.assert_close(output.prediction, expected.reconstruction, **CLOSE)
    torch.testing.assert_close(output.loss, expected.loss, **CLOSE)
