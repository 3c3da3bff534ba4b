"""Under Hugging Face's names: an encoder as the configuration and the weights of a model of transformers.

Does without transformers, which need not be installed. Names are those on disk, which transformers 4 and 5 read alike;
``formats.py`` has the way back.
"""

import re
from typing import Any

from timm.models.beit import Block as BeitBlock
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from simmimlib.model.encoders import Encoder, blocks_of, stages_of
from simmimlib.model.simmim import SimMIM
from simmimlib.settings import one_of, require

# timm's class -> transformers' model_type and beginning of its class names, and the block that has its arithmetic
FAMILIES: dict[str, tuple[str, str, type]] = {
    "VisionTransformer": ("vit", "ViT", Block),
    "Beit": ("beit", "Beit", BeitBlock),
    "SwinTransformer": ("swin", "Swin", SwinTransformerBlock),
    "SwinTransformerV2": ("swinv2", "Swinv2", SwinTransformerV2Block),
}
RENAMES = (  # timm's names; what is left of attention follows in `_rename`
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^patch_embed\.(norm|mask_token)", r"embeddings.\1"),
    (r"^norm\.", "layernorm."),
    (r"^rel_pos_bias\.", "encoder.relative_position_bias."),
    (r"^blocks\.", "encoder.layer."),
    (r"^layers\.(\d+)\.downsample\.", lambda match: f"encoder.layers.{int(match[1]) - 1}.downsample."),
    (r"^layers\.", "encoder.layers."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.gamma_", ".lambda_"),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.cpb_mlp\.", ".attn.continuous_position_bias_mlp."),
    (r"\.attn\.(q|k|v)_bias$", r".attn.\1.bias"),
    (r"\.attn\.q\.", ".attn.query."),
    (r"\.attn\.k\.", ".attn.key."),
    (r"\.attn\.v\.", ".attn.value."),
)


def to_huggingface(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``config.json`` and the tensors of transformers' model of the same features.

    Args:
        model: an ``Encoder`` or a plain timm model without classifier, for ``ViTModel``, ``BeitModel``, ``SwinModel``
            or ``Swinv2Model``, whose ``last_hidden_state`` equals ``forward_features`` (without the mask token); or a
            ``SimMIM``, for the ``...ForMaskedImageModeling`` of these, with mask token and head.

    Raises:
        ValueError: transformers has no place for a part of it; the parts are named.
    """
    simmim = model if isinstance(model, SimMIM) else None
    encoder = model.encoder if isinstance(model, SimMIM) else model
    timm_model: Any = encoder.model if isinstance(encoder, Encoder) else encoder
    one_of("model", type(timm_model).__name__, FAMILIES)
    kind, name, block_kind = FAMILIES[type(timm_model).__name__]
    blocks = blocks_of(timm_model)
    _check_blocks(blocks, block_kind)
    config = {"model_type": kind, "architectures": [f"{name}Model"], **_sizes(timm_model)}
    config |= _swin(timm_model, kind, config) if kind.startswith("swin") else _vit(timm_model, blocks, kind)

    state, own_names = {}, {}
    for own, tensor in timm_model.state_dict().items():
        parts = zip("qkv", tensor.chunk(3), strict=True) if ".attn.qkv." in own else [("", tensor)]
        for part, values in parts:
            new = _rename(own.replace(".qkv.", f".{part}."), kind)
            state[new], own_names[new] = values, own
    if simmim is None:
        state.pop("embeddings.mask_token", None)
    wanted = _names(config) | ({"embeddings.mask_token"} if simmim else set())
    spare, missing = [own_names[n] for n in state if n not in wanted], sorted(wanted - state.keys())
    where = f"{name}Model of transformers"
    require(not spare, "model", type(timm_model).__name__, f"without {_some(spare)}, which have no place in {where}")
    require(not missing, "model", type(timm_model).__name__, f"a model that has {_some(missing)}, as {where}")

    if simmim is not None:
        config |= _decoder(simmim, config, name)
        state |= {f"decoder.{own}": tensor for own, tensor in simmim.head.state_dict().items()}
    prefixed = {n if n.startswith("decoder.") else f"{kind}.{n}": tensor for n, tensor in state.items()}
    # parts of one tensor share its memory, which safetensors refuses
    return config, {n: tensor.detach().clone().contiguous() for n, tensor in prefixed.items()}


def _rename(name: str, kind: str) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)  # type: ignore[arg-type]
    if kind == "beit":
        name = name.replace(".attn.relative_", ".attn.relative_position_bias.relative_")
    return name.replace(".attn.", ".attention.self." if kind.startswith("swin") else ".attention.attention.")


def _names(config: dict[str, Any]) -> set[str]:
    """The tensors of transformers' model of this configuration, without mask token and decoder."""
    kind = config["model_type"]
    linear = ["embeddings.patch_embeddings.projection", "layernorm"]  # with weight and bias
    single: list[str] = []
    if kind in ("vit", "beit"):
        single += ["embeddings.cls_token"]
        if kind == "vit" or config["use_absolute_position_embeddings"]:
            single += ["embeddings.position_embeddings"]
        if config.get("use_shared_relative_position_bias"):
            single += ["encoder.relative_position_bias.relative_position_bias_table"]
        blocks = [f"encoder.layer.{i}." for i in range(config["num_hidden_layers"])]
    else:
        linear += ["embeddings.norm"]
        depths = config["depths"]
        for stage in range(len(depths) - 1):
            linear += [f"encoder.layers.{stage}.downsample.norm"]
            single += [f"encoder.layers.{stage}.downsample.reduction.weight"]
        blocks = [f"encoder.layers.{stage}.blocks.{i}." for stage, depth in enumerate(depths) for i in range(depth)]
    for block in blocks:
        attention = block + ("attention.self." if kind.startswith("swin") else "attention.attention.")
        parts = ("layernorm_before", "layernorm_after", "intermediate.dense", "output.dense", "attention.output.dense")
        linear += [block + part for part in parts]
        single += [attention + f"{part}.weight" for part in ("query", "key", "value")]
        if config.get("qkv_bias", True):
            with_bias = ("query", "key", "value") if kind in ("vit", "swin") else ("query", "value")
            single += [attention + f"{part}.bias" for part in with_bias]
        if kind == "swin":
            single += [attention + "relative_position_bias_table"]
        if kind == "swinv2":
            linear += [attention + "continuous_position_bias_mlp.0"]
            single += [attention + "continuous_position_bias_mlp.2.weight", attention + "logit_scale"]
        if config.get("use_relative_position_bias"):
            single += [attention + "relative_position_bias.relative_position_bias_table"]
        if config.get("layer_scale_init_value"):
            single += [block + "lambda_1", block + "lambda_2"]
    return {f"{name}.{part}" for name in linear for part in ("weight", "bias")} | set(single)


def _check_blocks(blocks: list, kind: type) -> None:
    """What the tensors' names do not tell."""
    others = {type(block).__name__ for block in blocks if type(block) is not kind}
    require(not others, "blocks", ", ".join(others), f"{kind.__name__} of timm")
    mlps = {type(block.mlp).__name__ for block in blocks}
    require(mlps == {"Mlp"}, "mlp_layer", ", ".join(mlps), "Mlp, of two layers")
    acts = {str(block.mlp.act) for block in blocks}
    require(acts <= {"GELU()", "GELU(approximate='none')"}, "act_layer", ", ".join(acts), "an exact GELU")
    for block in blocks:
        rows, width = block.attn.qkv.weight.shape
        require(rows == 3 * width, "attn.qkv", f"{rows} rows", f"{3 * width}: heads that share the width among them")


def _sizes(model: Any) -> dict[str, Any]:
    height, width = model.patch_embed.img_size
    patch = model.patch_embed.patch_size
    require(patch[0] == patch[1], "patch_size", patch, "square in transformers")
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    epsilons = {norm.eps for norm in norms}
    require(len(epsilons) == 1, "eps of the norms", sorted(epsilons), "one value for all in transformers")
    return {
        "image_size": height if height == width else [height, width],
        "patch_size": patch[0],
        "num_channels": model.patch_embed.proj.in_channels,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": norms[0].eps,
        "encoder_stride": model.feature_info[-1]["reduction"],
        "dtype": str(norms[0].weight.dtype).removeprefix("torch."),
    }


def _vit(model: Any, blocks: list, kind: str) -> dict[str, Any]:
    config = {
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": blocks[0].attn.num_heads,
        "intermediate_size": blocks[0].mlp.fc1.out_features,
    }
    if kind == "vit":
        tokens = model.patch_embed.num_patches + 1
        positions = () if model.pos_embed is None else tuple(model.pos_embed.shape)
        require(positions == (1, tokens, model.embed_dim), "pos_embed", positions, f"(1, {tokens}, {model.embed_dim})")
        return config | {"qkv_bias": blocks[0].attn.qkv.bias is not None}
    size = model.patch_embed.img_size
    # BeitRelativePositionBias exchanges height and width
    require(size[0] == size[1], "image_size", size, "square in transformers' BeitModel")
    gamma = blocks[0].gamma_1
    return config | {
        "use_absolute_position_embeddings": model.pos_embed is not None,
        "use_relative_position_bias": blocks[0].attn.relative_position_bias_table is not None,
        "use_shared_relative_position_bias": model.rel_pos_bias is not None,
        "layer_scale_init_value": 0.1 if gamma is not None else 0.0,  # the values themselves are weights
        "use_mean_pooling": False,  # the final norm stays with the tokens
        "drop_path_rate": 0.0,
    }


def _swin(model: Any, kind: str, common: dict[str, Any]) -> dict[str, Any]:
    """Also checks that transformers, which knows one window for all stages, cuts the same windows."""
    epsilon = common["layer_norm_eps"]  # which embeddings.norm and downsample.norm do not read
    require(epsilon == 1e-5, "eps of the norms", epsilon, "1e-5 in transformers")
    stages: list[list[Any]] = stages_of(model)
    window = stages[0][0].window_size[0]
    for blocks in stages:
        height, width = blocks[0].input_resolution
        for i, block in enumerate(blocks):
            side, shift = window, window // 2 if i % 2 else 0
            if min(height, width) <= window:
                side, shift = (window if kind == "swin" else min(height, window)), 0
            at = f"{block.window_size} shifted by {block.shift_size} at {height} x {width} positions"
            same = block.window_size == (side, side) and block.shift_size == (shift, shift)
            theirs = f"{(side, side)} shifted by {(shift, shift)}, as transformers cuts them with window_size {window}"
            require(same, "windows", at, theirs)
            # transformers pads and then shifts, timm shifts and then pads
            padded = height % side or width % side
            require(not (shift and padded), "windows", at, "a divisor of both sides, in transformers, where they shift")
    ratio = stages[0][0].mlp.fc1.out_features / model.embed_dim
    widths = [blocks[0].mlp.fc1.out_features for blocks in stages]
    wanted = [int(ratio * blocks[0].mlp.fc1.in_features) for blocks in stages]
    require(widths == wanted, "widths of the MLPs", widths, f"{wanted}, one ratio for all stages")
    config = {
        "embed_dim": model.embed_dim,
        "depths": [len(blocks) for blocks in stages],
        "num_heads": [blocks[0].attn.num_heads for blocks in stages],
        "window_size": window,
        "mlp_ratio": ratio,
        "drop_path_rate": 0.0,
        "use_absolute_embeddings": False,
    }
    if kind == "swin":
        return config | {"qkv_bias": stages[0][0].attn.qkv.bias is not None}
    config["pretrained_window_sizes"] = [blocks[0].attn.pretrained_window_size[0] for blocks in stages]
    return config | {"qkv_bias": stages[0][0].attn.q_bias is not None}


def _decoder(model: SimMIM, config: dict[str, Any], name: str) -> dict[str, Any]:
    """transformers' masked image modelling: linear head, pixels at full resolution, a square image; not for BEiT."""
    why = f"as {name}ForMaskedImageModeling has it (the encoder alone can be saved: model.encoder)"
    require(name != "Beit", "encoder", config["model_type"], "vit, swin or swinv2 with a head")
    for setting, only in (("head", "linear"), ("target", "pixels"), ("resolution", 1.0)):
        require(model.config[setting] == only, setting, model.config[setting], f"{only}, {why}")
    require(isinstance(config["image_size"], int), "image_size", config["image_size"], f"square, {why}")
    return {"architectures": [f"{name}ForMaskedImageModeling"]}


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + f" and {len(names) - 5} more" * (len(names) > 5)
