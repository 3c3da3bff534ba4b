"""Whose weights these are: the official ``.pth``, Hugging Face's, timm's or our own, told by the tensors' names."""

import math
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

PICKLED = (".pth", ".pt", ".bin")
HF_FILES = ("model.safetensors", "pytorch_model.bin")  # what transformers' save_pretrained has written, newest first

# timm downsamples at the start of the next stage, the official Swin and Hugging Face's at the end of a stage.
NEXT_STAGE = (r"\blayers\.(\d+)\.downsample\.", lambda match: f"layers.{int(match[1]) + 1}.downsample.")
ENCODER_AND_DECODER = (  # the encoder with a prefix in pre-training, without it in fine-tuning
    (r"^encoder\.|^(?!decoder\.)", "encoder.model."),
    (r"^decoder\.", "head."),
    (r"^encoder\.model\.mask_token$", "encoder.model.patch_embed.mask_token"),
)
# Name of the format; how some key of it begins, the first that fits counts; what makes its keys those of our SimMIM.
FORMATS = (
    ("simmimlib's", r"encoder\.model\.", ()),
    ("simmimlib's encoder", r"model\.", ((r"^model\.", "encoder.model."),)),
    (
        "Hugging Face's",
        r"(swin|swinv2|vit|beit)\.",
        (  # two spellings: on disk and, from transformers 5 on, in memory
            (r"\bembeddings\.(cls_token)", r"\1"),
            (r"\bembeddings\.(mask_token|norm)", r"patch_embed.\1"),
            (r"\bembeddings\.patch_embeddings\.projection", "patch_embed.proj"),
            (r"\bembeddings\.position_embeddings", "pos_embed"),
            (r"^(vit|beit)\.(encoder\.layer|layers)\.", "vit.blocks."),
            (r"^beit\.encoder\.relative_position_bias\.", "beit.rel_pos_bias."),
            (r"\battention\.((self|attention|relative_position_bias)\.)+", "attention."),
            (r"\battention\.(output\.dense|o_proj)\.", "attention.proj."),
            (r"\battention\.([qkv])(uery|ey|alue|_proj)\.", r"attention.\1."),
            (r"\bcontinuous_position_bias_mlp\.", "cpb_mlp."),
            (r"\blambda_", "gamma_"),
            (r"\battention\.", "attn."),
            (r"\bintermediate\.dense\.", "mlp.fc1."),
            (r"\boutput\.dense\.", "mlp.fc2."),
            (r"\blayernorm_before\.", "norm1."),
            (r"\blayernorm_after\.", "norm2."),
            (r"\blayernorm\.", "norm."),
            NEXT_STAGE,
            (r"^(swin|swinv2|vit|beit)\.(encoder\.)?", "encoder.model."),
            (r"^decoder\.", "head."),
        ),
    ),
    (
        "the official MAE's",
        r"decoder_(embed|pred)\.",
        ((r"^(?!decoder_|mask_token)", "encoder.model."),),
    ),
    (
        "the official FCMAE's",
        r"(encoder\.)?downsample_layers\.",
        (  # two spellings: of the sparse encoder in pre-training, and of the dense one in fine-tuning
            (r"\bdownsample_layers\.0\.", "stem."),
            (r"\bdownsample_layers\.(\d+)\.", r"stages.\1.downsample."),
            (r"\bstages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
            (r"\.(ln|linear)\.", "."),
            (r"\.dwconv\.", ".conv_dw."),
            (r"\.pwconv(\d)\.", r".mlp.fc\1."),
            (r"\.grn\.gamma$", ".mlp.grn.weight"),
            (r"\.grn\.beta$", ".mlp.grn.bias"),
            (r"\.kernel$", ".weight"),
            (r"^norm\.", "head.norm."),
            (r"^head\.(?!norm)", "head.fc."),
            (r"^encoder\.|^(?=stem\.|stages\.|head\.)", "encoder.model."),
        ),
    ),
    (
        "the official Swin's",
        r"(encoder\.)?layers\.0\.downsample\.",
        (*ENCODER_AND_DECODER, NEXT_STAGE, (r"^encoder\.model\.head\.", "encoder.model.head.fc.")),
    ),
    ("the official ViT's or timm's", "", ENCODER_AND_DECODER),
)


def to_simmimlib(state: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """Whose names these are, and the tensors under the names they have in our ``SimMIM``."""
    fits = (row for row in FORMATS if any(re.match(row[1], name) for name in state))
    style, _, renames = next(fits, FORMATS[-1])
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    for name in [name for name in renamed if ".attn.q." in name]:
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(part in renamed for part in parts):  # timm: one linear layer for the three
            joined = torch.cat([renamed.pop(part) for part in parts])
            renamed[name.replace(".attn.q.", ".attn.qkv.")] = joined
        elif name.endswith(".bias") and parts[2] in renamed:  # BEiT and SwinV2: keys have no bias
            for part in ("q", "v"):
                attention = name.removesuffix("q.bias")
                renamed[f"{attention}{part}_bias"] = renamed.pop(f"{attention}{part}.bias")
    if style == "the official MAE's":
        _reorder_pixels(renamed, "decoder_pred", "encoder.model.patch_embed.proj.weight")
    elif style == "the official FCMAE's":
        renamed = {name: _dense(name, tensor) for name, tensor in renamed.items()}
        _reorder_pixels(renamed, "pred", "encoder.model.stem.0.weight")
    return style, renamed


def _reorder_pixels(state: dict[str, Tensor], layer: str, patch_embedding: str) -> None:
    """Official rows of the last layer are ordered (row, column, channel), those of a pixel shuffle (channel, row,
    column)."""
    for name in (f"{layer}.weight", f"{layer}.bias"):
        if name in state and state[name].ndim and patch_embedding in state:
            rows, channels = state[name], state[patch_embedding].shape[1]
            patch = math.isqrt(len(rows) // channels)
            state[name] = rows.unflatten(0, (patch * patch, channels)).transpose(0, 1).flatten(0, 1)


def _dense(name: str, tensor: Tensor) -> Tensor:
    """A parameter of the official sparse encoder in the shape of a dense one; kernels have the row index fastest."""
    if name.endswith((".bias", ".grn.weight")):
        return tensor.flatten() if tensor.ndim else tensor
    if name.endswith(".conv_dw.weight") and tensor.ndim == 2:  # [k * k, C] -> [C, 1, k, k]
        side = math.isqrt(len(tensor))
        return tensor.unflatten(0, (side, side)).permute(2, 1, 0).unsqueeze(1)
    if name.endswith(".downsample.1.weight") and tensor.ndim == 3:  # [k * k, in, out] -> [out, in, k, k]
        side = math.isqrt(len(tensor))
        return tensor.unflatten(0, (side, side)).permute(3, 2, 1, 0)
    return tensor


def read_state(source: str | Path | dict) -> dict[str, Tensor]:
    """The tensors by name of a file, of a folder as ``save_pretrained`` writes it, or of a dictionary.

    Raises:
        ValueError: a file that is missing, damaged or holds anything but tensors and plain values (nothing is ever
            unpickled); no tensors by name.
    """
    content = source if isinstance(source, dict) else _read(Path(source))
    state = content.get("model", content) if isinstance(content, dict) else None  # official: {"model": ..., ...}
    if isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        return state
    where = "the dictionary" if content is source else repr(str(source))
    raise ValueError(f"checkpoint = {where}: must hold tensors by name, or such a dictionary under 'model'")


def _read(path: Path) -> object:
    if path.is_dir():
        files = [path / name for name in HF_FILES if (path / name).is_file()]
        if not files:
            raise ValueError(f"checkpoint = {str(path)!r}: a folder must hold {' or '.join(HF_FILES)}")
        path = files[0]
    if not path.is_file():
        raise ValueError(f"checkpoint = {str(path)!r}: there is no such file")
    try:
        if path.suffix in PICKLED:
            return torch.load(path, map_location="cpu", weights_only=True)
        return load_file(path)
    except Exception as error:  # a truncated or foreign file can fail anywhere inside the readers
        raise ValueError(
            f"checkpoint = {str(path)!r}: must be a whole .safetensors file, or a {', '.join(PICKLED)} file that holds "
            "nothing but tensors and plain values; other objects are never unpickled (if you trust the file, save "
            "its state dict again where it was written)"
        ) from error
