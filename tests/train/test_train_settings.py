import pytest
import torch

from simmimlib.train.settings import FinetuneSettings, PretrainSettings, ProbeSettings


@pytest.mark.parametrize(
    ("settings", "values", "message"),
    [
        (PretrainSettings, {"mask_ratio": 0.0}, "mask_ratio = 0.0: must be above 0"),
        (PretrainSettings, {"mask_patch_size": 6}, "image_size = 32: must be a multiple of mask_patch_size = 6"),
        (PretrainSettings, {"loss": "l3"}, "loss = 'l3': must be one of l1, l2, smooth_l1"),
        (PretrainSettings, {"encoder": "resnet18"}, "this family cannot take mask tokens"),
        (PretrainSettings, {"base_lr": "1e-4"}, "base_lr = '1e-4' (str): must be of type float (write 1.0e-4"),
        (PretrainSettings, {"flip": "true"}, "flip = 'true' (str): must be of type bool"),
        (PretrainSettings, {"mask_rato": 0.5}, "unknown parameter 'mask_rato': did you mean 'mask_ratio'?"),
        (PretrainSettings, {"epochs": -1}, "epochs = -1: must be 0 or more"),
        (PretrainSettings, {"seed": -1}, "seed = -1: must be 0 or more"),
        (PretrainSettings, {"skip_nonfinite": -1}, "skip_nonfinite = -1: must be 0 (stop) or more"),
        (PretrainSettings, {"method": "mim"}, "method = 'mim': must be one of simmim, mae, fcmae"),
        (
            PretrainSettings,
            {"method": "mae", "mask_ratio": 1.0},
            "mask_ratio = 1.0: must be low enough",
        ),
        (PretrainSettings, {"method": "mae", "mask_ratio": 0.99}, "mask_ratio = 0.99: must be low enough"),
        (PretrainSettings, {"method": "mae", "head": "mlp"}, "head = 'mlp': must be linear with method = mae"),
        (PretrainSettings, {"method": "mae", "resolution": 0.5}, "resolution = 0.5: must be 1 with method = mae"),
        (PretrainSettings, {"decoder_depth": 8}, "decoder_depth = 8: must be 1 with method = simmim, where head ="),
        (PretrainSettings, {"decoder_width": 8}, "decoder_width = 8: must be 0 with head = 'linear', which has no"),
        (PretrainSettings, {"head": "blocks_1", "decoder_heads": 5}, "decoder_width = 64: must be a multiple of the 5"),
        (
            PretrainSettings,
            {
                "method": "fcmae",
                "encoder": "convnextv2_atto",
                "encoder_kwargs": {"patch_size": 1},
                "decoder_heads": 2,
            },
            "decoder_heads = 2: must be 0 with method = fcmae, whose decoder has no attention",
        ),
        (PretrainSettings, {"method": "mae", "encoder": "convnextv2_atto", "encoder_kwargs": {}}, "sincos"),
        (
            PretrainSettings,
            {"method": "mae", "encoder": "convnextv2_atto", "encoder_kwargs": {}, "positions": "learned"},
            "encoder = 'convnextv2_atto': MAE takes timm's ViTs and DeiTs",
        ),
        (PretrainSettings, {"method": "mae", "encoder": "simmim_vit_base", "positions": "learned"}, "MAE takes timm's"),
        (PretrainSettings, {"method": "mae", "decoder_width": 30}, "decoder_width = 30: must be a multiple of 4"),
        (
            PretrainSettings,
            {"method": "mae", "decoder_heads": 3},
            "of 4 and of the 3 decoder_heads",
        ),
        (PretrainSettings, {"weight_init": "xavier"}, "weight_init = 'xavier': must be one of"),
        (PretrainSettings, {"method": "mae", "weight_init": "timm"}, "must be mae with method = mae"),
        (
            PretrainSettings,
            {"weight_init": "mae", "encoder": "simmim_vit_base", "encoder_kwargs": {}, "image_size": 64},
            "weight_init = 'mae': the encoder must be one of timm's ViTs and DeiTs, not simmim_vit_base",
        ),
        (PretrainSettings, {"method": "mae", "decoder_depth": 0}, "decoder_depth = 0: must be 1 or more"),
        (PretrainSettings, {"decoder_heads": -1}, "decoder_heads = -1: must be 0 or more"),
        (PretrainSettings, {"beta2": 1.0}, "beta2 = 1.0: must be above 0 and below 1"),
        (PretrainSettings, {"method": "fcmae"}, "encoder = 'vit_tiny_patch16_224': FCMAE takes timm's ConvNeXtV2"),
        (
            PretrainSettings,
            {
                "method": "fcmae",
                "encoder": "convnextv2_atto",
                "encoder_kwargs": {"patch_size": 1},
                "mask_patch_size": 4,
            },
            "mask_patch_size = 4: must be a multiple of 8, the encoder's stride, with method = fcmae",
        ),
        (PretrainSettings, {"schedule": "step"}, "decay_epoch = 0: must be above 0 with schedule = step"),
        (PretrainSettings, {"decay_epoch": 3}, "decay_epoch = 3: must be 0 with schedule = cosine"),
        (
            PretrainSettings,
            {"encoder_kwargs": {"positions": "sincos"}},
            "without positions, which the settings",
        ),
        (FinetuneSettings, {"epochs": 0}, "epochs = 0: must be 1 or more"),
        (FinetuneSettings, {"checkpoint": "none.safetensors"}, "there is no such file (empty = from scratch)"),
        (FinetuneSettings, {"mixup": 0.8, "batch_size": 7}, "batch_size = 7: must be even with mixup or cutmix"),
        (FinetuneSettings, {"crop_pct": 1.5}, "crop_pct = 1.5: must be above 0 and at most 1"),
        (FinetuneSettings, {"labelled_images": -1}, "labelled_images = -1: must be 0 (all) or more"),
        (FinetuneSettings, {"random_erasing": 1.5}, "random_erasing = 1.5: must be from 0 to 1"),
        (FinetuneSettings, {"precision": "float16"}, "precision = 'float16': must be one of auto, float32, bfloat16"),
        (ProbeSettings, {"checkpoint": "none.safetensors"}, "checkpoint = 'none.safetensors': there is no such file"),
        (ProbeSettings, {"block": 3}, "block = 3: must be from 1 to 2, the encoder's blocks, or 0 for its own output"),
        (ProbeSettings, {"block": -1}, "block = -1: must be 0 or more"),
        (ProbeSettings, {"k": 0}, "k = 0: must be above 0"),
        (ProbeSettings, {"temperature": 0.0}, "temperature = 0.0: must be above 0"),
        (ProbeSettings, {"crop_pct": 1.5}, "crop_pct = 1.5: must be above 0 and at most 1"),
        (ProbeSettings, {"interpolation": "nearest"}, "interpolation = 'nearest': must be one of bilinear, bicubic"),
        (ProbeSettings, {"pool": "token"}, "unknown parameter 'pool'"),
        (ProbeSettings, {"encoder": "resnet18"}, "this family cannot take mask tokens"),
    ],
)
def test_bad_settings(settings, values, message):
    with pytest.raises(ValueError) as error:
        settings.from_values(values)
    assert message in str(error.value)


@pytest.mark.parametrize("head", ["linear", "blocks_1"])
def test_simmim_may_start_from_the_weights_of_mae(head):
    """Xavier uniform: within a bound, of its standard deviation, without biases; timm's have 0.02 and biases of 0."""
    torch.manual_seed(0)
    model = PretrainSettings(weight_init="mae", positions="sincos", head=head).model(1)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert any(name.startswith("head") for name in layers) == (head == "blocks_1")
    for layer in layers.values():
        bound = (6 / sum(layer.weight.shape)) ** 0.5
        assert layer.weight.abs().max() <= bound and not layer.bias.any()
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    other = PretrainSettings(positions="sincos", head=head).model(1).encoder.model.blocks[0].attn.proj.weight
    assert other.std().item() == pytest.approx(0.02, rel=0.1)
