"""Out to plain timm: an encoder without its mask token, for fine-tuning here or elsewhere."""

import shutil
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from simmimlib.model.encoders import SIMMIM_VIT_BASE, Encoder, is_convnext
from simmimlib.model.mim import MaskedImageModel
from simmimlib.weights.checkpoints import load_checkpoint

TIMM_FILES = {"model.safetensors", "config.json"}


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
    model = timm.create_model(
        name, num_classes=num_classes, global_pool=global_pool, **{**sized, **config, **timm_kwargs}
    )
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


def save_timm(model: nn.Module, folder: str | Path) -> None:
    """Writes a plain timm model: ``timm.create_model("local-dir:" + folder, pretrained=True)`` gives it back.

    Args:
        model: from ``export_timm``, fine-tuned or not, or from ``timm.create_model``.
        folder: gets ``model.safetensors`` and ``config.json``, both or neither; an earlier one is replaced.

    Raises:
        ValueError: not a plain timm model, or one that timm does not rebuild (an encoder without final norm); a folder
            that holds anything else.
    """
    folder = Path(folder)
    if isinstance(model, (MaskedImageModel, Encoder)) or not hasattr(model, "pretrained_cfg"):
        raise ValueError(f"model of type {type(model).__name__}: must be a timm model, as export_timm returns it")
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - TIMM_FILES):
        raise ValueError(f"folder = {str(folder)!r}: must be new, or hold nothing but {', '.join(sorted(TIMM_FILES))}")
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        # creates the folders above, too
        timm.models.save_for_hf(model, temporary, safe_serialization=True)  # type: ignore[arg-type]
        with torch.device("meta"):
            rebuilt = timm.create_model(f"local-dir:{temporary}").state_dict()
        if {name: t.shape for name, t in rebuilt.items()} != {name: t.shape for name, t in model.state_dict().items()}:
            raise ValueError(f"model of type {type(model).__name__}: timm would rebuild it with other weights")
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
