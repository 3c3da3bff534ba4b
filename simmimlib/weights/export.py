"""Out to plain timm: an encoder without its mask token, for fine-tuning here or elsewhere (``folders`` saves it)."""

from typing import Any

import timm
from torch import nn

from simmimlib.model.encoders import SIMMIM_VIT_BASE, Encoder, is_convnext
from simmimlib.weights.checkpoints import load_checkpoint


def export_timm(
    encoder: Encoder,
    num_classes: int = 0,
    global_pool: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    **timm_kwargs: Any,
) -> nn.Module:
    """A plain timm model with the encoder's weights and no mask token.

    Args:
        num_classes: classes of a new, untrained classifier; 0 for none.
        global_pool: timm's pooling; None keeps the final norm where it was, so that ``forward_features`` equals the
            encoder's. ``"avg"`` is the official fine-tuning: a ViT's final norm is replaced by a new one after pooling.
        image_size: another input size; positions and relative biases are resized by timm.
        timm_kwargs: for example ``drop_path_rate=0.1``.

    Raises:
        ValueError: a distilled DeiT with another pooling than its own.
    """
    config = dict(encoder.config)
    name = config.pop("name")
    if name == "simmim_vit_base":
        name = SIMMIM_VIT_BASE[0]  # fine-tuning has a relative bias table in each block
    trained_size, final_norm = config.pop("image_size"), config.pop("final_norm", True)
    for pretraining_only in ("mask_token", "positions"):
        config.pop(pretraining_only, None)
    convolutional = is_convnext(encoder.model)  # takes images of any size
    sized = {} if convolutional else {"img_size": trained_size}
    pooled = global_pool is not None
    if not pooled:
        global_pool = "token" if "distilled" in name else ""
    elif global_pool != "token" and "distilled" in name:
        raise ValueError(
            f"global_pool = {global_pool!r}: {name} is read off its class and distillation tokens; use the DeiT of the "
            "same size without distillation, which can be fine-tuned here"
        )
    model = timm.create_model(
        name, num_classes=num_classes, global_pool=global_pool, **{**sized, **config, **timm_kwargs}
    )
    if convolutional:  # what timm notes of the others
        height, width = (side * encoder.stride for side in encoder.grid_size)
        noted: Any = model.pretrained_cfg
        noted["input_size"] = (config["in_chans"], height, width)
    norm: Any = getattr(model, "norm", None)
    if not final_norm:
        model.norm = nn.Identity()
    load_checkpoint(encoder.state_dict(), model)
    if pooled and not final_norm:
        model.norm = norm  # a new one for fine-tuning
    if image_size is not None and image_size != trained_size and not convolutional:
        model.set_input_size(  # type: ignore[operator]
            img_size=(image_size, image_size) if isinstance(image_size, int) else image_size
        )
    return model
