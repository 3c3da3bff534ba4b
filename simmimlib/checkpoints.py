"""Weights in and out: whole files of our own (safetensors), and plain timm models."""

import json
from pathlib import Path

import timm
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simmimlib.encoders import SIMMIM_VIT_BASE, Encoder, create_encoder
from simmimlib.runtime import whole_file
from simmimlib.simmim import SimMIM


def save_simmim(path, model: SimMIM) -> None:
    """Writes weights and, in the header, what rebuilds the model."""
    header = {"encoder": json.dumps(model.encoder.config), "simmim": json.dumps(model.config)}
    with whole_file(path) as temporary:
        save_file(model.state_dict(), temporary, header)


def load_simmim(path) -> SimMIM:
    """Rebuilds a pre-trained model from its file.

    Raises:
        ValueError: no such file, or not one that ``save_simmim`` wrote.
    """
    if not Path(path).is_file():
        raise ValueError(f"checkpoint = {str(path)!r}: there is no such file")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
        encoder = create_encoder(**json.loads(header["encoder"]))
        model = SimMIM(encoder, **json.loads(header["simmim"]))
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"checkpoint = {str(path)!r}: not a file written by simmimlib's pre-training") from error
    return load_checkpoint(path, model)


def load_checkpoint(path_or_state_dict, model: nn.Module) -> nn.Module:
    """Loads weights into ``model``; refuses anything that does not fit, by name.

    Args:
        path_or_state_dict: a safetensors file or a dictionary of tensors.

    Raises:
        ValueError: names or shapes differ.
    """
    state = path_or_state_dict if isinstance(path_or_state_dict, dict) else load_file(path_or_state_dict)
    own = model.state_dict()
    wrong = [f"{name}: missing" for name in own if name not in state]
    wrong += [f"{name}: not in the model" for name in state if name not in own]
    wrong += [
        f"{name}: {tuple(state[name].shape)}, the model has {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if wrong:
        raise ValueError(f"the checkpoint does not fit the model in {len(wrong)} places:\n  " + "\n  ".join(wrong[:20]))
    model.load_state_dict(state)
    return model


def export_timm(encoder: Encoder, num_classes=0, global_pool=None, image_size=None, **timm_kwargs) -> nn.Module:
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
    trained_size = config.pop("image_size")
    if global_pool is None:
        global_pool = "token" if "distilled" in name else ""
    model = timm.create_model(
        name, img_size=trained_size, num_classes=num_classes, global_pool=global_pool, **{**config, **timm_kwargs}
    )
    model.load_state_dict({**model.state_dict(), **_timm_state(encoder.model, model)})
    if image_size is not None and image_size != trained_size:
        model.set_input_size(img_size=(image_size, image_size) if isinstance(image_size, int) else image_size)
    return model


def _timm_state(source: nn.Module, target: nn.Module) -> dict[str, Tensor]:
    wanted = target.state_dict()
    state = dict(source.state_dict())
    state.pop("patch_embed.mask_token")
    shared = state.pop("rel_pos_bias.relative_position_bias_table", None)
    if shared is not None:
        for block in range(len(target.blocks)):
            state[f"blocks.{block}.attn.relative_position_bias_table"] = shared
    # a ViT that pools by mean has no final norm of the tokens any more, but a new one after the pooling
    return {name: tensor for name, tensor in state.items() if name in wanted or not name.startswith("norm.")}
