"""Numbers of other code: the official one's (golden files, where they are) and Hugging Face's; weights in and out."""

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from simmimlib.checkpoints import export_timm, load_checkpoint, load_simmim, save_simmim, save_timm, to_simmimlib
from simmimlib.encoders import create_encoder
from simmimlib.masking import MaskGenerator
from simmimlib.simmim import SimMIM

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
VIT = {"embed_dim": 48, "depth": 2, "num_heads": 4}
SWIN = {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8), "window_size": 2}
OFFICIAL = {"swin": ("swin_tiny_patch4_window7_224", SWIN), "vit": ("simmim_vit_base", VIT)}
CLOSE = {"rtol": 0, "atol": 1e-5}


def golden(name):
    path = GOLDEN / name
    if not path.is_file():
        pytest.skip(f"{name}: the official code's numbers are not in ../shared/golden")
    return path


def shake(model):
    """Random everywhere: also where a new model has zeros, such as bias tables and position embeddings."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


def build(name, size=64, **kwargs):
    timm_name, sizes = {**OFFICIAL, "plain vit": ("vit_tiny_patch16_224", VIT)}[name]
    return SimMIM(shake(create_encoder(timm_name, size, **{**sizes, **kwargs}))).eval()


def to_official(state):
    """A timm or simmimlib state under the official names; Swin's downsample goes back to the end of its stage."""
    names = {}
    for name in state:
        new = re.sub(r"layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)
        new = re.sub(r"^head\.(?=\d)", "decoder.", new.replace("head.fc.", "head."))
        names[name] = new.replace("encoder.model.", "encoder.").replace("patch_embed.mask_token", "mask_token")
    return {names[name]: tensor.clone() for name, tensor in state.items()}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_numbers(name, tmp_path):
    """Features, reconstruction, loss and every gradient's norm, from the official weights in the official wrapping."""
    numbers = {key: torch.from_numpy(value) for key, value in np.load(golden(f"official_{name}_tiny.npz")).items()}
    state = {key.removeprefix("state/"): value for key, value in numbers.items() if key.startswith("state/")}
    torch.save({"model": state}, tmp_path / "official.pth")
    model = load_checkpoint(tmp_path / "official.pth", build(name))
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


def hugging_face(name):
    transformers = pytest.importorskip("transformers")
    common = {"image_size": 64, "num_channels": 3}
    if name == "swin":
        sizes = {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "window_size": 2}
        config = transformers.SwinConfig(patch_size=4, encoder_stride=32, **sizes, **common)
        return shake(transformers.SwinForMaskedImageModeling(config))
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 192}
    # theirs defaults to an epsilon of 1e-12 in the norms, timm's ViT has 1e-6
    config = transformers.ViTConfig(patch_size=16, encoder_stride=16, layer_norm_eps=1e-6, **sizes, **common)
    return shake(transformers.ViTForMaskedImageModeling(config))


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
    ours = load_checkpoint(source, build(name))
    images = torch.randn(2, 3, 64, 64)
    mask = MaskGenerator(64, 32, ours.encoder.patch_size)(2, torch.Generator().manual_seed(0))
    mask[0] = False
    mask[0, 0, 0] = True  # images with different numbers of masked pixels: both take the mean over the batch
    with torch.no_grad():
        expected, output = theirs(images, bool_masked_pos=mask.flatten(1)), ours(images, mask)
    torch.testing.assert_close(output.prediction, expected.reconstruction, **CLOSE)
    torch.testing.assert_close(output.loss, expected.loss, **CLOSE)


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_pre_trained_into_encoder_and_timm(name, caplog):
    """The encoder alone; and a classifier to fine-tune, whose ViT has a bias table per block and a new norm."""
    model = build(name)
    state = to_official(model.state_dict())
    images = torch.randn(2, 3, 64, 64)
    caplog.set_level(logging.INFO, "simmimlib")
    encoder = load_checkpoint(state, build(name).encoder)
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
        load_checkpoint(state, build(name).encoder)


@pytest.mark.parametrize("name", [*OFFICIAL, "plain vit"])
def test_another_size_is_resized(name, caplog):
    small, kwargs = build(name), {"window_size": 4} if name == "swin" else {}
    caplog.set_level(logging.INFO, "simmimlib")
    large = load_checkpoint(to_official(small.state_dict()), build(name, 128, **kwargs))
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


@pytest.mark.parametrize(("final_norm", "image_size"), [(True, None), (False, 128)])
@pytest.mark.parametrize(
    ("name", "size", "kwargs"),
    [
        ("vit_tiny_patch16_224", (64, 96), {**VIT, "patch_size": 8}),
        ("swin_tiny_patch4_window7_224", 64, SWIN),
        ("simmim_vit_base", 96, {**VIT, "in_chans": 1}),
    ],
)
def test_timm_round_trip(name, size, kwargs, final_norm, image_size, tmp_path):
    encoder = shake(create_encoder(name, size, final_norm=final_norm, **kwargs))
    pooling = {} if final_norm else {"global_pool": "avg"}  # timm itself knows no encoder without a norm
    model = export_timm(encoder, image_size=image_size, drop_path_rate=0.1, num_classes=3, **pooling).eval()
    save_timm(model, tmp_path / "new" / "model")
    save_timm(model, tmp_path / "new" / "model")  # once more: replaced
    again = timm.create_model(f"local-dir:{tmp_path / 'new' / 'model'}", pretrained=True).eval()
    images = torch.randn(2, encoder.config["in_chans"], *model.patch_embed.img_size)
    with torch.no_grad():
        assert torch.equal(again.forward_features(images), model.forward_features(images))
        assert torch.equal(again(images), model(images))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]
    assert {path.name for path in (tmp_path / "new" / "model").iterdir()} == {"model.safetensors", "config.json"}


def test_encoder_without_final_norm():
    encoder = shake(create_encoder(*OFFICIAL["swin"][:1], 64, final_norm=False, **SWIN))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        plain = export_timm(encoder).eval().forward_features(images)
        torch.testing.assert_close(plain.permute(0, 3, 1, 2), encoder(images), rtol=0, atol=0)
    assert export_timm(encoder, 5, "avg").norm.weight.eq(1).all()  # fine-tuning starts with a new norm


def test_save_timm_refuses(tmp_path, monkeypatch):
    encoder = build("swin").encoder
    model = export_timm(encoder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="must be new, or hold nothing but config"):
        save_timm(model, tmp_path / "mine")
    with pytest.raises(ValueError, match="model of type Encoder: must be a timm model"):
        save_timm(encoder, tmp_path / "encoder")
    no_norm = create_encoder(OFFICIAL["swin"][0], 64, final_norm=False, **SWIN)
    with pytest.raises(ValueError, match="timm would rebuild it with other weights"):
        save_timm(export_timm(no_norm), tmp_path / "encoder")
    monkeypatch.setattr(timm.models._hub.json, "dump", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_timm(model, tmp_path / "half")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]  # whole or not at all


def test_mismatches_are_refused_by_name():
    model = build("vit")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    deeper = to_official(build("vit", depth=4).state_dict())
    with pytest.raises(
        ValueError, match=r"(?s)30 places \(read as the official ViT's.*blocks.2.gamma_1: not in"
    ) as error:
        load_checkpoint(deeper, model)
    assert error.value.args[0].count("\n") == 21 and error.value.args[0].endswith("\n  ...")  # 20 are named
    wider = to_official(build("vit", embed_dim=64).state_dict())
    with pytest.raises(ValueError, match=r"encoder.model.cls_token: \(1, 1, 64\), the model has \(1, 1, 48\)"):
        load_checkpoint(wider, model)
    state = to_official(model.state_dict())
    state["encoder.rel_pos_bias.relative_position_bias_table"] = torch.zeros(50, 4)  # 47 distances: no square
    with pytest.raises(ValueError, match=r"(?s)1 places.*bias_table: \(50, 4\), the model has \(52, 4\)"):
        load_checkpoint(state, model)
    with pytest.raises(ValueError, match="read as the official Swin's"):
        load_checkpoint(to_official(build("swin").state_dict()), model)
    theirs = hugging_face("plain vit").state_dict()
    theirs.pop("vit.layernorm.weight")
    with pytest.raises(ValueError, match=r"(?s)1 places.*encoder.model.norm.weight: missing"):
        load_checkpoint(theirs, build("plain vit"))
    half_a_classifier = timm.create_model("vit_tiny_patch16_224", num_classes=4, img_size=64, **VIT).state_dict()
    half_a_classifier.pop("head.bias")
    with pytest.raises(ValueError, match=r"(?s)1 places.*head.bias: missing"):
        load_checkpoint(half_a_classifier, timm.create_model("vit_tiny_patch16_224", num_classes=4, img_size=64, **VIT))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())  # nothing half loaded


class Dangerous:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_untrusted_and_broken_files_are_refused(tmp_path):
    model = build("vit")
    state = to_official(model.state_dict())
    torch.save({"model": state, "config": Dangerous(tmp_path / "ran")}, tmp_path / "pickled.pth")
    torch.save({"model": state}, tmp_path / "whole.pth")
    save_simmim(tmp_path / "whole.safetensors", model)
    for name in ("whole.pth", "whole.safetensors"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name.replace("whole", "half")).write_bytes(content[: len(content) // 2])
        (tmp_path / name.replace("whole", "empty")).write_bytes(b"")
        (tmp_path / name.replace("whole", "foreign")).write_bytes(b"<html>not found</html>" * 100)
    (tmp_path / "whole.txt").write_text("weights")
    broken = [
        "pickled.pth",
        "whole.txt",
        *(f"{a}{b}" for a in ("half", "empty", "foreign") for b in (".pth", ".safetensors")),
    ]
    for name in broken:
        with pytest.raises(ValueError, match=f"{name}': must be a whole .safetensors file, or a .pth, .pt, .bin file"):
            load_checkpoint(tmp_path / name, model)
    assert not (tmp_path / "ran").exists()
    (tmp_path / "folder").mkdir()
    for name, message in (("folder", "a folder must hold model.safetensors or"), ("none.pth", "there is no such file")):
        with pytest.raises(ValueError, match=message):
            load_checkpoint(tmp_path / name, model)
    torch.save({"epoch": 3, "optimizer": {}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth': must hold tensors by name"):
        load_checkpoint(tmp_path / "other.pth", model)
    with pytest.raises(ValueError, match="the dictionary: must hold tensors by name"):
        load_checkpoint({"model": {"head.0.bias": [0.0]}}, model)
    load_checkpoint(str(tmp_path / "whole.pth"), model)
    load_simmim(tmp_path / "whole.safetensors")
