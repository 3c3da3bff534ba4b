"""Weights in and out: saved with what rebuilds the model, loaded from any of the ``formats``, exported to plain timm.

Official behaviour for another image size or window: relative position biases are interpolated (bicubic), what follows
from the sizes (indices, attention masks) is built again, and a ViT's shared bias table is copied into each block.
"""

import json
import logging
import math
import re
import shutil
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table, resize_rel_pos_bias_table_simple
from torch import Tensor, nn

from simmimlib.machine.files import whole_file
from simmimlib.model.encoders import SIMMIM_VIT_BASE, Encoder, create_encoder
from simmimlib.model.formats import read_state, to_simmimlib
from simmimlib.model.simmim import SimMIM

log = logging.getLogger("simmimlib")
Model = TypeVar("Model", bound=nn.Module)

TIMM_FILES = {"model.safetensors", "config.json"}

DERIVED = re.compile(r"\.(relative_position_index|relative_coords_table|attn_mask)$")  # follows from the sizes
SHARED_BIAS = "rel_pos_bias.relative_position_bias_table"
# the parts of a timm model that come after its tokens and that fine-tuning may start anew
CLASSIFIER, TOP = r"head(_dist)?\.", r"(head|head_dist|fc_norm|attn_pool)\."


def save_simmim(path: str | Path, model: SimMIM) -> None:
    """Writes weights and, in the header, what rebuilds the model."""
    # one entry: safetensors writes several in an order that differs from run to run
    save_weights(path, model, {"simmimlib": json.dumps({"encoder": model.encoder.config, "simmim": model.config})})


def save_weights(path: str | Path, model: nn.Module, header: dict[str, str] | None = None) -> None:
    """Writes a safetensors file of the model's weights, whole or not at all."""
    with whole_file(path) as temporary:
        save_file(model.state_dict(), temporary, header)


def load_simmim(path: str | Path) -> SimMIM:
    """Rebuilds a pre-trained model from its file.

    Raises:
        ValueError: no such file, or not one that ``save_simmim`` wrote.
    """
    if not Path(path).is_file():
        raise ValueError(f"checkpoint = {str(path)!r}: there is no such file")
    try:
        with safe_open(path, "pt") as file:
            config = json.loads((file.metadata() or {})["simmimlib"])
        model = SimMIM(create_encoder(**config["encoder"]), **config["simmim"])
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"checkpoint = {str(path)!r}: not a file written by simmimlib's pre-training") from error
    return load_checkpoint(path, model)


def load_checkpoint(path_or_state_dict: str | Path | dict, model: Model) -> Model:
    """Loads weights into ``model``, logs what went where (logger ``simmimlib``) and refuses what it cannot explain.

    Args:
        path_or_state_dict: a ``.safetensors`` file, a ``.pth``, ``.pt`` or ``.bin`` file of tensors (never unpickled),
            a folder as Hugging Face's ``save_pretrained`` writes it, or the dictionary itself. Its keys tell whose it
            is: ours, the official SimMIM's (pre-trained or fine-tuned), transformers' ``SwinForMaskedImageModeling``
            or ``ViTForMaskedImageModeling``, or timm's. Only weights are read: the model's own settings, such as the
            epsilon of its norms, have to match.
        model: our ``SimMIM``, its ``Encoder``, or a plain timm model.

    What may differ, and is logged: position embeddings and relative position biases of a square grid are resized;
    derived buffers are dropped; an ``Encoder`` or timm model takes no prediction head and a timm model no mask token;
    a classifier is taken only for the same number of classes; what a timm model has after its tokens may stay new.

    Raises:
        ValueError: a file that cannot be read; names or shapes that do not fit. The model is then as it was.
    """
    given = isinstance(path_or_state_dict, dict)
    style, state = to_simmimlib(read_state(path_or_state_dict))
    own = model.state_dict()
    prefix = "" if isinstance(model, SimMIM) else "encoder." if isinstance(model, Encoder) else "encoder.model."
    inner = "encoder.model.".removeprefix(prefix)  # where the timm model lies in `own`

    derived = [name for name in state if DERIVED.search(name)]
    left_out = [name for name in state if not name.startswith(prefix) or (not inner and name.endswith(".mask_token"))]
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


def _some(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3] + ['...'] * (len(names) > 3))})"


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
    pooled = global_pool is not None
    if not pooled:
        global_pool = "token" if "distilled" in name else ""
    model = timm.create_model(
        name, img_size=trained_size, num_classes=num_classes, global_pool=global_pool, **{**config, **timm_kwargs}
    )
    norm = model.norm
    if not final_norm:
        model.norm = nn.Identity()
    load_checkpoint(encoder.state_dict(), model)
    if pooled:
        model.norm = norm  # of an encoder without one: a new one for fine-tuning
    if image_size is not None and image_size != trained_size:
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
    if isinstance(model, (SimMIM, Encoder)) or not hasattr(model, "pretrained_cfg"):
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
