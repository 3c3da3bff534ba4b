"""Frozen features (paper section 4.2): what an encoder knows before it is fine-tuned.

Features are the mean of the patch tokens: the loss is on these alone, not on a class token, and a Swin has none. The
paper's linear probe of ViT-B (56.7 % on ImageNet) reads the 8th of its 12 blocks: ``block = 8``.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from simmimlib.data.batches import Batches
from simmimlib.machine.device import autocast
from simmimlib.machine.distributed import local_shard, sum_over_ranks
from simmimlib.model.encoders import blocks_of, is_convnext
from simmimlib.settings import require


def check_block(model: nn.Module, block: int) -> None:
    count = len(blocks_of(model))
    require(0 <= block <= count, "block", block, f"from 1 to {count}, the encoder's blocks, or 0 for its own output")


def mean_tokens(tokens: Tensor, prefix: int = 0) -> Tensor:
    """[B, prefix + N, D] (ViT) or [B, h, w, D] (Swin, ConvNeXt) -> mean of the patch tokens [B, D], float32."""
    tokens = tokens[:, prefix:] if tokens.ndim == 3 else tokens.flatten(1, 2)
    return tokens.float().mean(1)


@torch.inference_mode()
def block_features(model: nn.Module, images: Tensor, blocks: Collection[int]) -> dict[int, Tensor]:
    """Features [B, D] of each of ``blocks``, counted from 1; 0 is the model's own output, after the final norm.

    timm's own ``forward_intermediates`` counts the stages of a Swin, not its blocks.
    """
    outputs: dict[int, Tensor] = {}
    hooks = [
        block.register_forward_hook(lambda module, inputs, output, number=number: outputs.update({number: output}))
        for number, block in enumerate(blocks_of(model), 1)
        if number in blocks
    ]
    try:
        outputs[0] = model.forward_features(images)  # type: ignore[operator]
    finally:
        for hook in hooks:
            hook.remove()
    prefix = getattr(model, "num_prefix_tokens", 0)
    if is_convnext(model):
        outputs = {number: output.permute(0, 2, 3, 1) for number, output in outputs.items()}
    return {number: mean_tokens(outputs[number], prefix) for number in blocks}


@torch.inference_mode()
def extract(
    model: nn.Module, batches: Batches, dtype: torch.dtype, blocks: Collection[int] = (0,)
) -> dict[int, Tensor]:
    """Features [N, D] of all images, in evaluation mode, in the order of their split, float32, in every process."""
    model.eval()
    found: dict[int, Tensor] = {}
    for rows, (images, _) in zip(batches.rows(0), batches, strict=True):
        # Of several processes one may have no share of the last batch, or of the only one; but it has to know D.
        with autocast(batches.device, dtype):
            features = block_features(model, images if len(images) else images.new_zeros(1, *images.shape[1:]), blocks)
        for block, mean in features.items():
            if block not in found:
                found[block] = mean.new_zeros(len(batches.labels), mean.shape[1])
            found[block][local_shard(rows).to(batches.device)] = mean[: len(images)]
    # each process fills in the rows of its share; the others are zero
    return {block: sum_over_ranks(features) for block, features in found.items()}
