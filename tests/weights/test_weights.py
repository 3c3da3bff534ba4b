import logging
import re

import pytest
import timm
import torch
import torch.nn.functional as F

from simmimlib.model.encoders import create_encoder
from simmimlib.model.fcmae import FCMAE
from simmimlib.model.mae import MAE
from simmimlib.model.simmim import SimMIM
from simmimlib.weights.checkpoints import load_checkpoint, load_model, save_model
from simmimlib.weights.export import export_timm
from small_models import (
    ENCODERS,
    OFFICIAL,
    SMALL_CONVNEXT,
    SMALL_VIT,
    SWIN,
    VIT,
    build,
    build_official,
    hugging_face,
    shake,
    to_official,
)


def test_checkpoint_round_trip(tmp_path):
    encoder, images, mask = build("swin")
    model = SimMIM(encoder, loss="l2", scope="all")
    save_model(tmp_path / "model.safetensors", model)
    again = load_model(tmp_path / "model.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(again(images, mask).loss, model(images, mask).loss)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_checkpoint_that_does_not_fit(tmp_path):
    model = SimMIM(build("vit")[0])
    state = model.state_dict()
    state["head.0.weight"] = state["head.0.weight"][:5]
    del state["head.0.bias"]
    with pytest.raises(ValueError, match=r"(?s)2 places.*head.0.bias: missing.*head.0.weight: \(5, 32, 1, 1\)"):
        load_checkpoint(state, model)
    (tmp_path / "junk.safetensors").write_bytes(b"junk" * 100)
    with pytest.raises(ValueError, match="not a file written by simmimlib"):
        load_model(tmp_path / "junk.safetensors")
    with pytest.raises(ValueError, match="there is no such file"):
        load_model(tmp_path / "none.safetensors")


def test_shared_relative_bias_is_copied_into_every_block():
    encoder, images, _ = build("simmim vit")
    torch.nn.init.normal_(encoder.model.rel_pos_bias.relative_position_bias_table)
    plain = export_timm(encoder).eval()
    with torch.no_grad():
        expected = plain.forward_features(images)[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
        torch.testing.assert_close(encoder(images), expected)


@pytest.mark.parametrize("name", ["vit", "simmim vit", "swin", "swin v2"])
def test_another_resolution_for_fine_tuning(name):
    encoder, _, _ = build(name)
    model = export_timm(encoder, 10, "avg", image_size=128).eval()
    assert model(torch.randn(1, 3, 128, 128)).shape == (1, 10)


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_pre_trained_into_encoder_and_timm(name, caplog):
    """The encoder alone; and a classifier to fine-tune, whose ViT has a bias table per block and a new norm."""
    model = build_official(name)
    state = to_official(model.state_dict())
    images = torch.randn(2, 3, 64, 64)
    caplog.set_level(logging.INFO, "simmimlib")
    encoder = load_checkpoint(state, build_official(name).encoder)
    assert "left out: 2 (head.0.weight, head.0.bias)" in caplog.text
    assert "fc_norm" not in caplog.text
    timm_name = OFFICIAL[name][0].replace("simmim_vit_base", "beit_base_patch16_224")
    plain = timm.create_model(timm_name, img_size=64, num_classes=7, **OFFICIAL[name][1]).eval()
    fresh = {key: tensor.clone() for key, tensor in plain.state_dict().items()}
    caplog.clear()
    load_checkpoint(state, plain)
    new = {"swin": "2 (head.fc.weight, head.fc.bias)", "vit": "4 (fc_norm.weight, fc_norm.bias, head.weight, ...)"}
    assert f"new, not in it: {new[name]}" in caplog.text
    assert all(torch.equal(plain.state_dict()[key], fresh[key]) for key in fresh if key.startswith(("head", "fc_norm")))
    with torch.no_grad():
        expected = model.encoder(images)
        torch.testing.assert_close(encoder(images), expected, rtol=0, atol=0)
        tokens = plain.forward_features(images)
    if name == "vit":  # its norm belongs to pre-training: without it the tokens are those before the norm
        model.encoder.model.norm = torch.nn.Identity()
        with torch.no_grad():
            expected = model.encoder(images)
        tokens = tokens[:, 1:].unflatten(1, (4, 4))
    torch.testing.assert_close(tokens.permute(0, 3, 1, 2), expected)


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_fine_tuned_into_timm(name, caplog):
    timm_name = OFFICIAL[name][0].replace("simmim_vit_base", "beit_base_patch16_224")

    def classifier(classes):
        return timm.create_model(timm_name, img_size=64, num_classes=classes, **OFFICIAL[name][1])

    trained = shake(classifier(5))
    state = to_official(trained.state_dict())
    assert "head.weight" in state and ("norm.weight" in state or "fc_norm.weight" in state)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        again = load_checkpoint(state, classifier(5)).eval()
        torch.testing.assert_close(again(images), trained(images), rtol=0, atol=0)
        caplog.set_level(logging.INFO, "simmimlib")
        other = load_checkpoint(state, classifier(6)).eval()
        pooled = [model.forward_head(model.forward_features(images), pre_logits=True) for model in (other, trained)]
        torch.testing.assert_close(*pooled, rtol=0, atol=0)
    assert re.search(r"left out: 2 \(head\.\S*weight, head\.\S*bias\); new, not in it: 2 \(head", caplog.text)
    with pytest.raises(ValueError, match=r"mask_token: missing"):
        load_checkpoint(state, build_official(name).encoder)


@pytest.mark.parametrize("name", [*OFFICIAL, "plain vit"])
def test_another_size_is_resized(name, caplog):
    small, kwargs = build_official(name), {"window_size": 4} if name == "swin" else {}
    caplog.set_level(logging.INFO, "simmimlib")
    large = load_checkpoint(to_official(small.state_dict()), build_official(name, 128, **kwargs))
    if name == "swin":  # plain bicubic, as the official code
        table = "encoder.model.layers.0.blocks.0.attn.relative_position_bias_table"
        grid = small.state_dict()[table].T.reshape(1, -1, 3, 3)
        expected = F.interpolate(grid, (7, 7), mode="bicubic").flatten(2)[0].T
        assert "resized: 5 (" in caplog.text
    else:
        table = f"encoder.model.{'pos_embed' if name == 'plain vit' else 'rel_pos_bias.relative_position_bias_table'}"
        small_model = small.encoder.model
        expected_size = (128, 128)
        del small_model.patch_embed.mask_token  # timm's own way to another size does not know it
        small_model.set_input_size(expected_size)
        expected = small_model.state_dict()[table.removeprefix("encoder.model.")]
        assert "resized: 1 (" in caplog.text
    torch.testing.assert_close(large.state_dict()[table], expected)
    assert large(torch.randn(1, 3, 128, 128), torch.ones(1, *large.encoder.model.patch_embed.grid_size).bool()).loss > 0


def test_encoder_without_final_norm():
    encoder = shake(create_encoder(*OFFICIAL["swin"][:1], 64, final_norm=False, **SWIN))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        plain = export_timm(encoder).eval().forward_features(images)
        torch.testing.assert_close(plain.permute(0, 3, 1, 2), encoder(images), rtol=0, atol=0)
    assert export_timm(encoder, 5, "avg").norm.weight.eq(1).all()  # fine-tuning starts with a new norm


def test_mismatches_are_refused_by_name():
    model = build_official("vit")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    deeper = to_official(build_official("vit", depth=4).state_dict())
    with pytest.raises(
        ValueError, match=r"(?s)30 places \(read as the official ViT's.*blocks.2.gamma_1: not in"
    ) as error:
        load_checkpoint(deeper, model)
    assert error.value.args[0].count("\n") == 21 and error.value.args[0].endswith("\n  ...")  # 20 are named
    wider = to_official(build_official("vit", embed_dim=64).state_dict())
    with pytest.raises(ValueError, match=r"encoder.model.cls_token: \(1, 1, 64\), the model has \(1, 1, 48\)"):
        load_checkpoint(wider, model)
    state = to_official(model.state_dict())
    state["encoder.rel_pos_bias.relative_position_bias_table"] = torch.zeros(50, 4)  # 47 distances: no square
    with pytest.raises(ValueError, match=r"(?s)1 places.*bias_table: \(50, 4\), the model has \(52, 4\)"):
        load_checkpoint(state, model)
    for rows in (2, 3):  # of which a class token has three: no grid is left
        state["encoder.rel_pos_bias.relative_position_bias_table"] = torch.zeros(rows, 4)
        with pytest.raises(ValueError, match=rf"(?s)1 places.*bias_table: \({rows}, 4\), the model has \(52, 4\)"):
            load_checkpoint(state, model)
    with pytest.raises(ValueError, match="read as the official Swin's"):
        load_checkpoint(to_official(build_official("swin").state_dict()), model)
    theirs = hugging_face("plain vit").state_dict()
    theirs.pop("vit.layernorm.weight")
    with pytest.raises(ValueError, match=r"(?s)1 places.*encoder.model.norm.weight: missing"):
        load_checkpoint(theirs, build_official("plain vit"))
    half_a_classifier = timm.create_model("vit_tiny_patch16_224", num_classes=4, img_size=64, **VIT).state_dict()
    half_a_classifier.pop("head.bias")
    with pytest.raises(ValueError, match=r"(?s)1 places.*head.bias: missing"):
        load_checkpoint(half_a_classifier, timm.create_model("vit_tiny_patch16_224", num_classes=4, img_size=64, **VIT))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())  # nothing half loaded


def test_what_a_checkpoint_is_rebuilt_with(tmp_path):
    """Everything the model was made with comes back, not only what the weights' shapes tell."""
    timm_name, size, kwargs = ENCODERS["vit"]
    encoder = create_encoder(timm_name, size, 1, final_norm=False, drop_path_rate=0.2, **kwargs)
    model = SimMIM(encoder, "blocks_2", "smooth_l1", "all", "normalised_pixels", beta=0.3, resolution=0.5)
    save_model(tmp_path / "model.safetensors", model)
    again = load_model(tmp_path / "model.safetensors")
    assert again.encoder.config == encoder.config and again.config == model.config
    images, mask = torch.randn(2, 1, 64, 64), torch.rand(2, 8, 8) < 0.5
    with torch.no_grad():
        assert torch.equal(again.eval()(images, mask).loss, model.eval()(images, mask).loss)


@pytest.mark.parametrize("method", ["mae", "fcmae"])
def test_the_other_methods_come_back_too(tmp_path, method):
    if method == "mae":
        vit = {**SMALL_VIT, "patch_size": 8}
        encoder = create_encoder("vit_tiny_patch16_224", 64, mask_token=False, positions="sincos", **vit)
        model = MAE(encoder, 16, 2, 2, "l1", "all", "pixels", visible=16)
    else:
        encoder = create_encoder("convnextv2_atto", 64, 1, mask_token=False, **SMALL_CONVNEXT)
        model = FCMAE(encoder, 16, 2, "smooth_l1", "all", "pixels", beta=0.3)
    shake(model)
    save_model(tmp_path / "model.safetensors", model)
    again = load_model(tmp_path / "model.safetensors").eval()
    assert type(again) is type(model) and again.encoder.config == encoder.config and again.config == model.config
    images = torch.randn(2, encoder.config["in_chans"], 64, 64)
    mask = torch.zeros(2, 64 // encoder.patch_size, 64 // encoder.patch_size, dtype=torch.bool)
    mask[:, :, : 32 // encoder.patch_size] = True
    with torch.no_grad():
        assert torch.equal(again(images, mask).loss, model(images, mask).loss)
        expected, plain = encoder(images), export_timm(encoder).eval().forward_features(images)
    assert not any("mask_token" in name for name in encoder.state_dict())
    plain = plain[:, 1:].unflatten(1, (8, 8)).permute(0, 3, 1, 2) if method == "mae" else plain
    torch.testing.assert_close(plain, expected, rtol=0, atol=0)


def test_colour_bins_come_back_with_their_normalisation(tmp_path):
    model = SimMIM(build("vit")[0], target="bins_8", mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    save_model(tmp_path / "model.safetensors", model)
    again = load_model(tmp_path / "model.safetensors").target
    assert torch.equal(again.mean, model.target.mean) and torch.equal(again.std, model.target.std)


def test_saving_twice_gives_the_same_bytes(tmp_path):
    model = SimMIM(build("vit")[0])
    for name in ("one", "two"):
        save_model(tmp_path / f"{name}.safetensors", model)
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_a_distilled_deit_is_pooled_by_its_tokens_alone():
    encoder = create_encoder("deit_tiny_distilled_patch16_224", 32)
    assert export_timm(encoder).global_pool == "token"
    with pytest.raises(ValueError, match="global_pool = 'avg': deit_tiny_distilled_patch16_224 is read off its class"):
        export_timm(encoder, 10, "avg")
