"""Numbers of the official MAE and FCMAE (tests/golden)."""

import json
import logging

import numpy as np
import pytest
import timm
import torch

from simmimlib.model.encoders import create_encoder
from simmimlib.model.fcmae import FCMAE
from simmimlib.model.mae import MAE, init_mae
from simmimlib.weights.checkpoints import load_checkpoint
from simmimlib.weights.export import export_timm
from simmimlib.weights.formats import to_simmimlib
from small_models import golden

TARGETS = {"pixels": "pixels", "norm_pix": "normalised_pixels"}
CLOSE = {"rtol": 0, "atol": 1e-5}
EQUAL = {"rtol": 1e-6, "atol": 1e-7}


def mae(target="pixels", image_size=32, **changes):
    sizes = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    encoder = create_encoder(
        "vit_tiny_patch16_224", image_size, mask_token=False, positions="sincos", **sizes | changes
    )
    return MAE(encoder, decoder_width=32, decoder_depth=1, decoder_heads=2, target=target)


def fcmae(target="pixels"):
    sizes = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
    return FCMAE(create_encoder("convnextv2_atto", 96, mask_token=False, **sizes), decoder_width=16, target=target)


def numbers_of(file, part=""):
    numbers = {key.removeprefix(part): torch.from_numpy(value) for key, value in np.load(golden(file)).items()}
    state = {key.removeprefix("state/"): value for key, value in numbers.items() if key.startswith("state/")}
    return numbers, state


def gradient_norms(numbers, target, state):
    """The official ones under our names. Reordering and reshaping leave a norm as it is, so scalars are renamed."""
    prefix = f"gradnorm/{target}/"
    norms = {key.removeprefix(prefix): value for key, value in numbers.items() if key.startswith(prefix)}
    return to_simmimlib(norms)[1]


def token_mask(model, mask):
    """The golden files' mask, of whole mask patches, on the encoder's token grid."""
    repeat = model.encoder.stride // model.encoder.patch_size
    mask = mask.view(len(mask), *model.encoder.grid_size)
    return mask.repeat_interleave(repeat, 1).repeat_interleave(repeat, 2)


def compare(model, numbers, target, expected):
    output = model(numbers["images"], token_mask(model, numbers["mask"]))
    torch.testing.assert_close(output.loss, numbers[f"loss/{target}"], **EQUAL)
    output.loss.backward()
    actual = {name: p.grad.norm() for name, p in model.named_parameters() if p.requires_grad}
    assert expected.keys() == actual.keys()
    for key, norm in expected.items():
        torch.testing.assert_close(actual[key], norm, rtol=2e-6, atol=1e-8, msg=lambda text, key=key: f"{key}: {text}")
    return output


@pytest.mark.parametrize("target", TARGETS)
def test_official_mae_numbers(target, tmp_path):
    numbers, state = numbers_of("official_mae_tiny.npz")
    torch.save({"model": state}, tmp_path / "official.pth")
    model = load_checkpoint(tmp_path / "official.pth", mae(TARGETS[target]))
    output = compare(model, numbers, target, gradient_norms(numbers, target, state))
    if target == "pixels":
        torch.testing.assert_close(output.prediction, numbers["reconstruction"], **CLOSE)
    shown = numbers["noise"].argsort()[:, :4]
    torch.testing.assert_close(model.encode(numbers["images"], shown.unsqueeze(-1)), numbers["latent"], **CLOSE)
    plain = export_timm(model.encoder).eval()
    torch.testing.assert_close(plain.forward_features(numbers["images"]), numbers["tokens_full"], **CLOSE)


@pytest.mark.parametrize("target", TARGETS)
def test_official_fcmae_numbers(target, tmp_path):
    numbers, state = numbers_of("fcmae_tiny_standin.npz", "image_grn/")
    torch.save({"model": state}, tmp_path / "official.pth")
    model = load_checkpoint(tmp_path / "official.pth", fcmae(TARGETS[target]))
    output = compare(model, numbers, target, gradient_norms(numbers, target, state))
    if target == "pixels":
        torch.testing.assert_close(output.prediction, numbers["prediction"], **CLOSE)
    hidden = numbers["mask"].unsqueeze(1)
    features = model.encode(numbers["images"], token_mask(model, numbers["mask"])).masked_fill(hidden, 0)
    torch.testing.assert_close(features, numbers["features"], **CLOSE)


def test_mae_starts_as_the_official_one_does():
    numbers, _ = numbers_of("official_mae_tiny.npz")
    statistics = {key.removeprefix("init/"): value for key, value in numbers.items() if key.startswith("init/")}
    torch.manual_seed(0)
    model = mae()
    init_mae(model)
    fresh = model.state_dict()
    for name, (mean, deviation, largest) in statistics.items():
        if name == "decoder_pos_embed":
            continue
        ours = fresh[next(iter(to_simmimlib({name: torch.zeros(()), "decoder_embed.": torch.zeros(())})[1]))].double()
        count = ours.numel()
        assert abs(ours.mean() - mean) <= 6 * deviation / count**0.5 + 1e-9, name
        assert abs(ours.std() - deviation) <= 6 * deviation / (2 * count) ** 0.5 + 1e-9, name
        assert (ours.abs().max() == 0) == (largest == 0), name
        if count > 1000:  # uniform or normal: the largest value tells
            assert ours.abs().max() == pytest.approx(largest.item(), rel=0.1), name


KEYS = "official_checkpoint_keys_mae_fcmae.json"


def of_shapes(names):
    """A state dict of these shapes; each tensor is constant and unlike the others, and takes no memory."""
    shapes = json.loads(golden(KEYS).read_text())[names]
    return {name: torch.tensor(float(i)).expand(shape) for i, (name, shape) in enumerate(shapes.items(), 1)}


def test_names_and_shapes_of_the_released_mae(caplog):
    encoder = create_encoder("vit_base_patch16_224", 224, mask_token=False, positions="sincos")
    model = MAE(encoder, decoder_width=512, decoder_depth=8, decoder_heads=16)
    count = sum(p.numel() for p in model.parameters()) + model.decoder_positions.numel()
    assert count == pytest.approx(111.9e6, abs=0.06e6)
    caplog.set_level(logging.INFO, "simmimlib")
    state = of_shapes("mae_vit_base_patch16")
    load_checkpoint({"model": state}, model)
    count = len(state) - 1
    assert f"placed {count} of {count} tensors; dropped as derived: 1 (decoder_pos_embed)" in caplog.text
    plain = timm.create_model("vit_base_patch16_224", num_classes=0)
    load_checkpoint(state, plain)
    assert torch.equal(plain.blocks[3].attn.qkv.weight, state["blocks.3.attn.qkv.weight"])


def test_names_and_shapes_of_the_released_fcmae(caplog):
    model = FCMAE(create_encoder("convnextv2_atto", 224, mask_token=False), decoder_width=512)
    caplog.set_level(logging.INFO, "simmimlib")
    state = of_shapes("fcmae_convnextv2_atto_sparse")
    load_checkpoint({"model": state}, model)
    assert f"placed {len(state)} of {len(state)} tensors; all as is" in caplog.text
    base = create_encoder("convnextv2_base", 224, mask_token=False)
    assert sum(p.numel() for p in base.parameters()) == pytest.approx(87.7e6, abs=0.06e6)
    load_checkpoint(of_shapes("fcmae_convnextv2_base_sparse"), FCMAE(base, decoder_width=512))


@pytest.mark.parametrize("names", ["fcmae_convnextv2_atto_sparse", "fcmae_convnextv2_atto_dense_names"])
def test_fcmae_weights_land_where_timms_converter_puts_them(names):
    """Both spellings, into plain timm."""
    to_timm = json.loads(golden(KEYS).read_text())["fcmae_convnextv2_atto_to_timm"]
    state, plain = of_shapes(names), timm.create_model("convnextv2_atto", num_classes=0)
    load_checkpoint(state, plain)
    placed = plain.state_dict()
    sparse = list(to_timm)
    assert len(sparse) == 136
    for i, official in enumerate(sparse):
        name, shape = to_timm[official]
        own = official if official in state else list(state)[i]
        assert list(placed[name].shape) == shape
        assert (placed[name] == state[own].flatten()[0]).all(), (official, name)
