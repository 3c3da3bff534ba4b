"""Folders that plain timm and plain transformers open, and their cards."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from simmimlib.machine.files import write_json
from simmimlib.model.encoders import create_encoder
from simmimlib.model.simmim import SimMIM
from simmimlib.weights.checkpoints import load_checkpoint
from simmimlib.weights.export import export_timm
from simmimlib.weights.folders import FILES, save_huggingface, save_timm
from small_models import OFFICIAL, SMALL_CONVNEXT, SMALL_SWIN, SMALL_VIT, SWIN, VIT, build_official, shake

SWIN_6 = {**SMALL_SWIN, "window_size": 6}  # the paper's: 192 pixels, windows of 6
VIT_3 = {**SMALL_VIT, "depth": 3}  # timm reads the last three blocks of a ViT
BACKBONES = {  # name, size it was trained at, changes, (channels and stride of each map)
    "vit": ("vit_tiny_patch16_224", 224, VIT_3, [(32, 16)] * 3),
    "simmim vit": ("simmim_vit_base", 224, VIT_3, [(32, 16)] * 3),
    "swin": ("swin_tiny_patch4_window7_224", 192, SWIN_6, [(16, 4), (32, 8), (64, 16), (128, 32)]),
    "swin v2": ("swinv2_tiny_window8_256", 256, SMALL_SWIN, [(16, 4), (32, 8), (64, 16), (128, 32)]),
    "convnext v2": ("convnextv2_atto", 224, SMALL_CONVNEXT, [(8, 4), (16, 8), (24, 16), (32, 32)]),
}


@pytest.mark.parametrize(("final_norm", "image_size"), [(True, None), (False, 128)])
@pytest.mark.parametrize(
    ("name", "size", "kwargs"),
    [
        ("vit_tiny_patch16_224", (64, 96), {**VIT, "patch_size": 8}),
        ("swin_tiny_patch4_window7_224", 64, SWIN),
        ("simmim_vit_base", 96, {**VIT, "in_chans": 1}),
        ("convnextv2_atto", 64, SMALL_CONVNEXT),
        ("convnextv2_nano", 32, {**SMALL_CONVNEXT, "patch_size": 1}),
    ],
)
def test_timm_round_trip(name, size, kwargs, final_norm, image_size, tmp_path):
    if not final_norm and "convnext" in name:
        pytest.skip("a ConvNeXt has no final norm")
    encoder = shake(create_encoder(name, size, final_norm=final_norm, **kwargs))
    pooling = {} if final_norm else {"global_pool": "avg"}  # timm itself knows no encoder without a norm
    model = export_timm(encoder, image_size=image_size, drop_path_rate=0.1, num_classes=3, **pooling).eval()
    save_timm(model, tmp_path / "new" / "model")
    save_timm(model, tmp_path / "new" / "model")  # once more: replaced
    again = timm.create_model(f"local-dir:{tmp_path / 'new' / 'model'}", pretrained=True).eval()
    sides = (size, size) if "convnext" in name else model.patch_embed.img_size
    images = torch.randn(2, encoder.config["in_chans"], *sides)
    with torch.no_grad():
        assert torch.equal(again.forward_features(images), model.forward_features(images))
        assert torch.equal(again(images), model(images))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]
    assert {path.name for path in (tmp_path / "new" / "model").iterdir()} == FILES


def test_save_timm_refuses(tmp_path, monkeypatch):
    encoder = build_official("swin").encoder
    model = export_timm(encoder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="must be new, or hold nothing but an earlier export"):
        save_timm(model, tmp_path / "mine")
    (tmp_path / "mine" / "thesis.tex").rename(tmp_path / "mine" / "README.md")  # of an export's names, but none
    with pytest.raises(ValueError, match="must be new, or hold nothing but an earlier export"):
        save_timm(model, tmp_path / "mine")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="must be new"):
        save_timm(model, tmp_path / "file")
    (tmp_path / "file").unlink()
    with pytest.raises(ValueError, match="model of type Encoder: must be a timm model"):
        save_timm(encoder, tmp_path / "encoder")
    no_norm = create_encoder(OFFICIAL["swin"][0], 64, final_norm=False, **SWIN)
    with pytest.raises(ValueError, match="timm would rebuild it with other weights"):
        save_timm(export_timm(no_norm), tmp_path / "encoder")
    monkeypatch.setattr(timm.models._hub.json, "dump", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_timm(model, tmp_path / "half")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]  # whole or not at all


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("size", [224, (192, 256)])
def test_a_timm_backbone_for_detection_and_segmentation(name, size, tmp_path):
    timm_name, trained_size, kwargs, maps = BACKBONES[name]
    encoder = shake(create_encoder(timm_name, trained_size, **kwargs))
    save_timm(export_timm(encoder), tmp_path / "model")
    # as a detector asks for it, whatever the size of pre-training
    folder = f"local-dir:{tmp_path / 'model'}"
    sized = {} if "convnext" in timm_name else {"img_size": size}  # which takes any size
    backbone = timm.create_model(folder, pretrained=True, features_only=True, **sized).eval()
    height, width = size if isinstance(size, tuple) else (size, size)
    with torch.inference_mode():
        found = backbone(torch.randn(1, 3, height, width))
    if timm_name.startswith("swin"):  # timm's Swins have channels last
        found = [x.permute(0, 3, 1, 2) for x in found]
    assert [tuple(x.shape) for x in found] == [
        (1, channels, height // stride, width // stride) for channels, stride in maps
    ]
    assert backbone.feature_info.channels() == [channels for channels, _ in maps]
    assert backbone.feature_info.reduction() == [stride for _, stride in maps]


def test_the_last_map_of_a_backbone_is_the_encoders_output_before_its_norm(tmp_path):
    for name, size in (("vit", (192, 256)), ("swin", (192, 256))):
        timm_name, _, kwargs, _ = BACKBONES[name]
        encoder = shake(create_encoder(timm_name, size, **{**kwargs, **({"window_size": 8} if name == "swin" else {})}))
        save_timm(export_timm(encoder), tmp_path / name)
        backbone = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True, features_only=True).eval()
        images = torch.randn(1, 3, *size)
        with torch.inference_mode():
            last = backbone(images)[-1]
            last = last if name == "swin" else last.permute(0, 2, 3, 1)
            torch.testing.assert_close(encoder.model.norm(last).permute(0, 3, 1, 2), encoder(images))


def test_from_a_size_that_is_not_square_the_model_is_resized_before_it_is_saved(tmp_path):
    encoder = shake(create_encoder("swin_tiny_patch4_window7_224", (192, 256), **SMALL_SWIN, window_size=8))
    save_timm(export_timm(encoder, image_size=224), tmp_path / "model")
    backbone = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True, features_only=True)
    assert [x.shape[1] for x in backbone(torch.randn(1, 3, 224, 224))] == [56, 28, 14, 7]


HUGGING_FACE = {  # name of the encoder, image size, changes
    "ViTModel": ("vit_tiny_patch16_224", 64, SMALL_VIT),
    "ViTModel, wide": ("vit_tiny_patch16_224", (64, 96), {**SMALL_VIT, "patch_size": 8, "in_chans": 1}),
    "ViTModel, no bias": ("deit_tiny_patch16_224", 64, {**SMALL_VIT, "qkv_bias": False}),
    "BeitModel": ("beit_base_patch16_224", 64, SMALL_VIT),
    "BeitModel, one bias": ("simmim_vit_base", 64, SMALL_VIT),
    "BeitModel, positions": ("beit_base_patch16_224", 64, {**SMALL_VIT, "use_abs_pos_emb": True, "init_values": None}),
    "SwinModel": ("swin_tiny_patch4_window7_224", 192, SWIN_6),
    "SwinModel, wide": ("swin_tiny_patch4_window7_224", (96, 192), {**SMALL_SWIN, "window_size": 3}),
    "SwinModel, padded": ("swin_tiny_patch4_window7_224", 96, {**SMALL_SWIN, "window_size": 2, "depths": (1, 1, 1, 1)}),
    "Swinv2Model": ("swinv2_tiny_window8_256", 64, {**SMALL_SWIN, "window_size": 4}),
    "Swinv2Model, larger windows": ("swinv2_base_window12to16_192to256", 256, SMALL_SWIN),
}


def theirs(folder, name=""):
    """The model of transformers in a folder, of the class that ``config.json`` names; nothing may be missing."""
    transformers = pytest.importorskip("transformers")
    (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
    kwargs = {"add_pooling_layer": False} if (name or architecture) in ("ViTModel", "BeitModel") else {}
    cls = getattr(transformers, name or architecture)
    model, loading = cls.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not loading["missing_keys"] and not loading["mismatched_keys"]
    assert name or not loading["unexpected_keys"]
    return architecture, model.eval()


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_transformers_gives_the_same_features(name, tmp_path):
    timm_name, size, kwargs = HUGGING_FACE[name]
    encoder = shake(create_encoder(timm_name, size, **kwargs))
    save_huggingface(encoder, tmp_path / "encoder")
    plain = export_timm(encoder).eval()
    save_huggingface(plain, tmp_path / "timm")
    height, width = encoder.model.patch_embed.img_size
    images = torch.randn(2, encoder.config["in_chans"], height, width)
    for folder, model in (("encoder", encoder.model), ("timm", plain)):
        architecture, hugging_face = theirs(tmp_path / folder)
        assert architecture == name.partition(",")[0]
        with torch.inference_mode():
            tokens = model.forward_features(images)
            tokens = tokens.flatten(1, 2) if tokens.ndim == 4 else tokens
            found = hugging_face(images).last_hidden_state
        torch.testing.assert_close(found, tokens, rtol=0, atol=1e-5)
    again = load_checkpoint(tmp_path / "timm", shake(export_timm(create_encoder(timm_name, size, **kwargs))))
    assert all(torch.equal(tensor, plain.state_dict()[key]) for key, tensor in again.state_dict().items())
    assert {path.name for path in (tmp_path / "timm").iterdir()} == FILES


@pytest.mark.parametrize("name", ["ViTModel", "SwinModel", "Swinv2Model"])
def test_masked_image_modelling_goes_there_and_back(name, tmp_path):
    timm_name, size, kwargs = HUGGING_FACE[name]
    model = shake(SimMIM(create_encoder(timm_name, size, **kwargs)))
    save_huggingface(model, tmp_path / "model")
    architecture, hugging_face = theirs(tmp_path / "model")
    assert architecture == name.replace("Model", "ForMaskedImageModeling")
    images = torch.randn(2, 3, size, size)
    mask = torch.rand(2, *model.encoder.model.patch_embed.grid_size) < 0.5
    with torch.inference_mode():
        output = model(images, mask)
        # transformers wants patch_size == encoder_stride only where it works the loss out for a ViT
        found = hugging_face(images, bool_masked_pos=mask.flatten(1))
        torch.testing.assert_close(found.reconstruction, output.prediction, rtol=0, atol=1e-5)
        _, features = theirs(tmp_path / "model", name)  # the same folder, as the encoder alone
        tokens = model.encoder(images).flatten(2).transpose(1, 2)
        prefix = model.encoder.model.num_prefix_tokens if name == "ViTModel" else 0
        torch.testing.assert_close(features(images).last_hidden_state[:, prefix:], tokens, rtol=0, atol=1e-5)
    again = load_checkpoint(tmp_path / "model", SimMIM(create_encoder(timm_name, size, **kwargs)))
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in again.state_dict().items())


REFUSED = {
    "cls_token": ({"class_token": False}, r"pos_embed = \(1, 16, 32\): must be \(1, 17, 32\)"),
    "registers": ({"reg_tokens": 2}, "pos_embed"),
    "layer scale": ({"init_values": 0.1}, r"without blocks.0.ls1.gamma, blocks.0.ls2.gamma, .* no place in ViTModel"),
    "norm of queries": ({"qk_norm": True}, r"without blocks.0.attn.q_norm.weight, blocks.0.attn.q_norm.bias"),
    "norm before": ({"pre_norm": True}, r"without norm_pre.weight, norm_pre.bias"),
    "activation": ({"act_layer": "quick_gelu"}, r"act_layer = 'QuickGELU\(\)': must be an exact GELU"),
    "block": ({"block_fn": timm.models.vision_transformer.ResPostBlock}, "blocks = 'ResPostBlock'"),
    "mlp": ({"mlp_layer": timm.layers.SwiGLU}, "mlp_layer = 'SwiGLU': must be Mlp, of two layers"),
    "no final norm": ({"final_norm": False}, "a model that has layernorm.bias, layernorm.weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_transformers_has_no_place_for_is_refused_by_name(name, tmp_path):
    changes, message = REFUSED[name]
    encoder = create_encoder("vit_tiny_patch16_224", 64, **SMALL_VIT, **changes)
    with pytest.raises(ValueError, match=message):
        save_huggingface(encoder, tmp_path / "model")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("timm_name", "size", "changes", "message"),
    [
        ("deit_tiny_distilled_patch16_224", 64, SMALL_VIT, "model = 'VisionTransformerDistilled': must be one of Vis"),
        ("beit_base_patch16_224", (64, 96), SMALL_VIT, r"image_size = \(64, 96\): must be square in .* BeitModel"),
        ("swin_tiny_patch4_window7_224", 96, SMALL_SWIN, r"windows = '\(6, 6\) .* as transformers cuts them"),
        ("swin_tiny_patch4_window7_224", (64, 96), {**SMALL_SWIN, "window_size": 2}, r"\(0, 1\) at 2 x 3|2 x 3"),
        ("swin_tiny_patch4_window7_224", 64, {**SMALL_SWIN, "window_size": (2, 1)}, "windows"),
        ("swin_tiny_patch4_window7_224", 128, {**SMALL_SWIN, "window_size": 3}, r"at 8 x 8 .* divisor of both sides"),
        ("swinv2_tiny_window8_256", 128, {**SMALL_SWIN, "window_size": 3}, r"at 8 x 8 .* divisor of both sides"),
    ],
)
def test_other_families_and_windows_are_refused(timm_name, size, changes, message, tmp_path):
    encoder = create_encoder(timm_name, size, **changes)
    if timm_name.startswith("swin") and size == (64, 96):  # one block there: a second one would be shifted
        encoder = create_encoder(timm_name, size, **{**changes, "depths": (1, 1, 1, 2)})
    with pytest.raises(ValueError, match=message):
        save_huggingface(encoder, tmp_path / "model")


def test_classifiers_and_other_heads_are_refused_by_name(tmp_path):
    encoder = create_encoder("swin_tiny_patch4_window7_224", 64, **SWIN)
    with pytest.raises(ValueError, match=r"without head.fc.weight, head.fc.bias, which have no place in SwinModel"):
        save_huggingface(export_timm(encoder, num_classes=3, global_pool="avg"), tmp_path / "model")
    for changes in ({"head": "mlp"}, {"target": "bins_8"}, {"resolution": 0.5}):
        ((name, value),) = changes.items()
        with pytest.raises(ValueError, match=rf"{name} = '?{value}'?: must be .* as SwinForMaskedImageModeling has it"):
            save_huggingface(SimMIM(encoder, **changes), tmp_path / "model")
    with pytest.raises(ValueError, match="must be vit, swin or swinv2 with a head"):
        save_huggingface(build_official("vit"), tmp_path / "model")


def run_folder(folder, statistics="imagenet", data="cifar10"):
    """What the stages of a run write, in small."""
    given = {"data": {"data": data, "size": 32, "statistics": statistics, "holdout_per_class": 0}}
    origin = {"commit": "0123456789", "device": "a CPU", "seed": 3, "data": "pictures", "data_digest": "abc"}
    stages = {
        "pretrain": (
            {"images_seen": 640, "val_loss": 0.51234, **origin},
            {"mask_ratio": 0.6, "data": str(folder / "packed"), "out": "results/a/pretrain"},
        ),
        "finetune": (
            {"top1": 53.3, "labelled_images": 5000, **origin},
            {"epochs": 20, "checkpoint": "results/a/pretrain/model.safetensors"},
        ),
    }
    for stage, (metrics, values) in stages.items():
        write_json(folder / stage / "metrics.json", metrics)
        write_json(folder / stage / "parameters.json", {**given, stage: values})
    return folder / "pretrain"


def test_the_card_says_data_recipe_numbers_and_commit(tmp_path):
    encoder = create_encoder("vit_tiny_patch16_224", 64, **SMALL_VIT)
    run = run_folder(tmp_path / "run")
    save_timm(export_timm(encoder), tmp_path / "timm", run)
    save_huggingface(encoder, tmp_path / "hf", run)
    for folder, load in (("timm", "timm.create_model("), ("hf", "ViTModel.from_pretrained(")):
        card = (tmp_path / folder / "README.md").read_text()
        data = ("SimMIM, pre-trained on cifar10", "by mean [0.485, 0.456, 0.406]")
        origin = ("commit: 0123456789", "device: a CPU", "seed: 3")
        for said in (load, *data, "`mask_ratio`: 0.6", "| 0.5123 |", "| 53.3 |", "5,000", *origin, "MIT"):
            assert said in card, said
        assert "holdout" not in card and str(tmp_path) not in card
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    assert timm.data.resolve_model_data_config(model)["mean"] == [0.485, 0.456, 0.406]
    assert model.pretrained_cfg["tag"] == "simmim"  # not the weights that timm has for this name


def test_what_is_not_known_is_not_claimed(tmp_path):
    encoder = create_encoder("vit_tiny_patch16_224", 64, in_chans=1, **SMALL_VIT)
    save_timm(export_timm(encoder), tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert card.count("Not recorded") == 4 and "1 x 64 x 64" in card and "SimMIM" not in card
    save_timm(timm.create_model("resnet18"), tmp_path / "resnet")  # any model of timm's
    assert "3 x 224 x 224" in (tmp_path / "resnet" / "README.md").read_text()
    run = run_folder(tmp_path / "run", "dataset", "folder")
    save_timm(export_timm(encoder), tmp_path / "model", run)  # the packed images lie elsewhere
    card = (tmp_path / "model" / "README.md").read_text()
    assert "on pictures" in card and "normalised, pixels" not in card and "that were not found" in card
    write_json(tmp_path / "run" / "packed" / "manifest.json", {"digest": "abc", "mean": [0.1], "std": [0.3]})
    save_timm(export_timm(encoder), tmp_path / "model", run)
    assert "by mean [0.1] and deviation [0.3]" in (tmp_path / "model" / "README.md").read_text()
    assert timm.create_model(f"local-dir:{tmp_path / 'model'}").pretrained_cfg["mean"] == [0.1]
    parameters = tmp_path / "run" / "finetune" / "parameters.json"
    parameters.write_text(parameters.read_text().replace("results/a", "results/b"))  # started from another checkpoint
    save_timm(export_timm(encoder), tmp_path / "model", run)
    assert "53.3" not in (tmp_path / "model" / "README.md").read_text()
    with pytest.raises(ValueError, match=r"must be a folder with a pre-training's metrics.json"):
        save_timm(export_timm(encoder), tmp_path / "model", tmp_path)


@pytest.mark.slow
def test_neither_folder_needs_simmimlib(tmp_path):
    pytest.importorskip("transformers")
    encoder = shake(create_encoder("swin_tiny_patch4_window7_224", 64, **SWIN))
    save_timm(export_timm(encoder), tmp_path / "timm")
    save_huggingface(encoder, tmp_path / "hf")
    code = (
        "import sys; sys.modules['simmimlib'] = None\n"
        "import torch, timm, transformers\n"
        f"a = timm.create_model('local-dir:{tmp_path / 'timm'}', pretrained=True).eval()\n"
        f"b = transformers.SwinModel.from_pretrained('{tmp_path / 'hf'}').eval()\n"
        "images = torch.randn(2, 3, 64, 64)\n"
        "with torch.inference_mode():\n"
        "    torch.testing.assert_close(a.forward_features(images).flatten(1, 2), b(images).last_hidden_state)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_transformers_is_not_needed_to_write(tmp_path):
    code = "import sys; sys.modules['transformers'] = None; import simmimlib.weights.folders"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_saving_for_transformers_twice_gives_the_same_bytes(tmp_path):
    model = build_official("plain vit")
    for name in ("one", "two"):
        save_huggingface(model, tmp_path / name)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two and "decoder.0.weight" in load_file(tmp_path / "one" / "model.safetensors")


@pytest.mark.parametrize("name", ["convnext v2", "vit"])
def test_the_size_of_the_images_is_noted(name, tmp_path):
    """Where a model takes images of any size, too."""
    timm_name, _, kwargs, _ = BACKBONES[name]
    save_timm(export_timm(create_encoder(timm_name, (64, 96), 1, **kwargs)), tmp_path / "model")
    again = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    assert tuple(again.pretrained_cfg["input_size"]) == (1, 64, 96)
    assert "images of 1 x 64 x 96 (channels, height, width)" in (tmp_path / "model/README.md").read_text()
