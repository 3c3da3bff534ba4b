"""Checkpoints: saved with what rebuilds the model, loaded from any of the ``formats``.

Official behaviour for another image size or window: relative position biases are interpolated (bicubic), what follows
from the sizes (indices, attention masks) is built again, and a ViT's shared bias table is copied into each block.
"""

import json
import logging
import math
import re
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table, resize_rel_pos_bias_table_simple
from torch import Tensor, nn

from simmimlib.machine.files import whole_file
from simmimlib.model.encoders import Encoder, create_encoder
from simmimlib.model.fcmae import FCMAE
from simmimlib.model.mae import MAE
from simmimlib.model.mim import MaskedImageModel
from simmimlib.model.simmim import SimMIM
from simmimlib.weights.formats import read_state, to_simmimlib

log = logging.getLogger("simmimlib")
Model = TypeVar("Model", bound=nn.Module)

# follows from the sizes
DERIVED = re.compile(r"\.(relative_position_index|relative_coords_table|attn_mask)$|^decoder_pos_embed$")
SHARED_BIAS = "rel_pos_bias.relative_position_bias_table"
# the parts of a timm model that come after its tokens and that fine-tuning may start anew
CLASSIFIER, TOP = r"head(_dist)?\.", r"(head|head_dist|fc_norm|attn_pool)\."


METHODS: dict[str, type[MaskedImageModel]] = {"simmim": SimMIM, "mae": MAE, "fcmae": FCMAE}


def save_model(path: str | Path, model: MaskedImageModel) -> None:
    """Writes a SimMIM's, MAE's or FCMAE's weights and, in the header, what rebuilds it."""
    method = next(name for name, kind in METHODS.items() if type(model) is kind)
    # one entry: safetensors writes several in an order that differs from run to run
    save_weights(path, model, {"simmimlib": json.dumps({"encoder": model.encoder.config, method: model.config})})


def save_weights(path: str | Path, model: nn.Module, header: dict[str, str] | None = None) -> None:
    """Writes a safetensors file of the model's weights, whole or not at all."""
    with whole_file(path) as temporary:
        save_file(model.state_dict(), temporary, header)


def load_model(path: str | Path) -> MaskedImageModel:
    """Rebuilds a pre-trained model from its file.

    Raises:
        ValueError: no such file, or not one that ``save_model`` wrote.
    """
    if not Path(path).is_file():
        raise ValueError(f"checkpoint = {str(path)!r}: there is no such file")
    try:
        with safe_open(path, "pt") as file:
            config = json.loads((file.metadata() or {})["simmimlib"])
        encoder = create_encoder(**config.pop("encoder"))
        ((method, settings),) = config.items()
        model = METHODS[method](encoder, **settings)
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"checkpoint = {str(path)!r}: not a file written by simmimlib's pre-training") from error
    return load_checkpoint(path, model)


def load_checkpoint(path_or_state_dict: str | Path | dict, model: Model) -> Model:
    """Loads weights into ``model``, logs what went where (logger ``simmimlib``) and refuses what it cannot explain.

    Args:
        path_or_state_dict: a ``.safetensors`` file, a ``.pth``, ``.pt`` or ``.bin`` file of tensors (never unpickled),
            a folder as Hugging Face's ``save_pretrained`` writes it, or the dictionary itself. Its keys tell whose it
            is: ours, the official SimMIM's, MAE's or FCMAE's (pre-trained or fine-tuned), transformers'
            ``SwinForMaskedImageModeling`` or ``ViTForMaskedImageModeling``, or timm's. Only weights are read: the
            model's own settings, such as the epsilon of its norms, have to match.
        model: our ``SimMIM``, ``MAE`` or ``FCMAE``, its ``Encoder``, or a plain timm model.

    What may differ, and is logged: position embeddings and relative position biases of a square grid are resized;
    derived buffers are dropped; an ``Encoder`` or timm model takes no prediction head or decoder, and one without a
    mask token none; linear layers fit 1 x 1 convolutions;
    a classifier is taken only for the same number of classes; what a timm model has after its tokens may stay new.

    Raises:
        ValueError: a file that cannot be read; names or shapes that do not fit. The model is then as it was.
    """
    given = isinstance(path_or_state_dict, dict)
    style, state = to_simmimlib(read_state(path_or_state_dict))
    own = model.state_dict()
    prefix = (
        "" if isinstance(model, MaskedImageModel) else "encoder." if isinstance(model, Encoder) else "encoder.model."
    )
    inner = "encoder.model.".removeprefix(prefix)  # where the timm model lies in `own`

    derived = [name for name in state if DERIVED.search(name)]
    left_out = [
        name
        for name in state
        if not name.startswith(prefix) or (name.endswith(".mask_token") and name.removeprefix(prefix) not in own)
    ]
    state = {name.removeprefix(prefix): state[name] for name in state if name not in {*derived, *left_out}}
    classifier, new = [name for name in state if re.match(inner + CLASSIFIER, name)], []
    if all(name not in own or _only_count_differs(state[name], own[name]) for name in classifier):
        new = [name for name in own if re.match(inner + TOP, name) and (name not in state or name in classifier)]
        left_out += classifier
    if f"{inner}fc_norm.weight" in new and f"{inner}norm.weight" not in own:
        # a ViT that pools by mean has no final norm of the tokens any more, but a new one after the pooling
        left_out += [name for name in state if name.startswith(f"{inner}norm.")]
    state = {name: tensor for name, tensor in state.items() if name not in left_out}
    tables = [name for name in own if re.match(inner + r"blocks\.\d+\.attn\.relative_position_bias_table", name)]
    if inner + SHARED_BIAS in state and tables:
        state |= dict.fromkeys(tables, state.pop(inner + SHARED_BIAS))

    for name in state:  # timm's smaller ConvNeXts have 1 x 1 convolutions for linear layers
        if name in own and state[name].shape != own[name].shape and _squeezed(state[name]) == _squeezed(own[name]):
            state[name] = state[name].reshape(own[name].shape)
    resized = [name for name in state if name in own and state[name].shape != own[name].shape]
    state |= {name: _resize(name, state[name], model) for name in resized}

    wrong = [f"{name}: missing" for name in own if name not in state and name not in new]
    wrong += [f"{name}: not in the model" for name in state if name not in own]
    wrong += [
        f"{name}: {tuple(state[name].shape)}, the model has {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if wrong:
        lines = "\n  ".join(wrong[:20] + ["..."] * (len(wrong) > 20))
        raise ValueError(f"the checkpoint does not fit the model in {len(wrong)} places (read as {style}):\n  {lines}")
    model.load_state_dict(state, strict=False)  # checked above; what is new stays as it is
    groups = {"resized": resized, "dropped as derived": derived, "left out": left_out, "new, not in it": new}
    source = "state dict" if given else path_or_state_dict
    summary = "; ".join(f"{what}: {_some(names)}" for what, names in groups.items() if names)
    log.info("%s read as %s: placed %d of %d tensors; %s", source, style, len(state), len(own), summary or "all as is")
    return model


def _resize(name: str, tensor: Tensor, model: nn.Module) -> Tensor:
    """``tensor`` at the size the model has; unchanged where timm cannot resize it."""
    owner, _, kind = name.rpartition(".")
    module: Any = model.get_submodule(owner)
    shape = model.state_dict()[name].shape
    if kind == "pos_embed" and tensor.ndim == 3 and tensor.shape[2] == shape[2]:  # [1, prefix + h * w, D]
        grid = module.patch_embed.grid_size
        prefix = shape[1] - math.prod(grid)
        if _is_square(tensor.shape[1] - prefix):
            return resample_abs_pos_embed(tensor, grid, num_prefix_tokens=prefix)
    if kind == "relative_position_bias_table" and tensor.ndim == 2 and tensor.shape[1] == shape[1]:  # [n, heads]
        window = module.window_size
        class_token = shape[0] - math.prod(2 * side - 1 for side in window)  # 3 entries of a ViT's table
        # The official code: plain bicubic for Swin; for a ViT BEiT's, which keeps the near distances fine.
        resize = resize_rel_pos_bias_table if class_token else resize_rel_pos_bias_table_simple
        if _is_square(tensor.shape[0] - class_token):
            return resize(tensor, window, shape)
    return tensor


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


def _only_count_differs(a: Tensor, b: Tensor) -> bool:
    return a.shape[1:] == b.shape[1:] and len(a) != len(b)


def _squeezed(tensor: Tensor) -> torch.Size:
    """The shape [out, in] of a linear layer's weight, or of a 1 x 1 convolution's [out, in, 1, 1]."""
    return tensor.shape[:2] if tensor.shape[2:] == (1, 1) else tensor.shape


def _some(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3] + ['...'] * (len(names) > 3))})"
