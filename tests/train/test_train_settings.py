import pytest

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
