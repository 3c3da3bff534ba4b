"""Parameter groups, layer-wise decay and schedules (paper appendix A); optimisers and schedulers are timm's.

What the official code does and this module keeps: one-dimensional parameters and biases are not decayed; in
pre-training the relative position bias tables are (its exemption there never matches a name), in fine-tuning Swin's
are not; the mask token is decayed in a ViT and not in a Swin. MAE and FCMAE exempt no name in pre-training: class and
mask tokens are decayed. (GRN's parameters, which the official FCMAE decays, have one dimension in timm and are not.)
Layer decay scales the peak rate of each group, while
the warm-up's start and the minimum are the same for all groups. The cosine counts from step 0, so the rate has
already dropped a little when the warm-up ends.
"""

import re
from typing import Any

import torch
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from torch import nn

from simmimlib.model.encoders import is_convnext, stages_of
from simmimlib.model.simmim import SimMIM
from simmimlib.train.settings import TrainSettings


def scale_rate(rate: float, batch_size: int) -> float:
    """The linear rule: base rates are given for a batch of 512 images."""
    return rate * batch_size / 512


def not_decayed(model: Any, pretraining: bool) -> set[str]:
    """Names of parameters with two or more dimensions that are exempt from weight decay."""
    if is_convnext(model):
        return set()
    is_swin = hasattr(model, "layers")
    names = set(model.no_weight_decay())
    if pretraining or not is_swin:
        names = {name for name in names if "relative_position_bias_table" not in name}
    if is_swin:
        names.add("patch_embed.mask_token")
    return names


def layer_id(name: str, depths: list[int]) -> int:
    """Depth of a timm parameter: 0 for the patch embedding, 1 ... L for the blocks, L + 1 for what is on top.

    ``depths`` are the blocks of each stage, or [L] for a ViT. A Swin's downsample belongs to the last block below it,
    a ConvNeXt's, and its stem, to the first block above it (the official code's "single" rule).
    """
    if name.startswith(("patch_embed", "cls_token", "reg_token", "dist_token", "pos_embed", "rel_pos_bias")):
        return 0
    if match := re.match(r"blocks\.(\d+)\.", name):
        return int(match[1]) + 1
    if match := re.match(r"(?:layers|stages)\.(\d+)\.blocks\.(\d+)\.", name):
        return sum(depths[: int(match[1])]) + int(match[2]) + 1
    if match := re.match(r"layers\.(\d+)\.downsample\.", name):  # timm puts it at the start of the next stage
        return sum(depths[: int(match[1])])
    if match := re.match(r"stages\.(\d+)\.downsample\.|stem\.", name):
        return sum(depths[: int(match[1] or 0)]) + 1
    return sum(depths) + 1


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, layer_decay: float = 1.0, pretraining: bool = False
) -> list[dict[str, Any]]:
    """Optimiser groups, one for each layer and for decayed / not decayed parameters.

    ``model`` is a ``MaskedImageModel`` in pre-training and a timm model in fine-tuning. Fixed positions are in none.
    """
    timm_model, prefix = (
        (model.encoder.model, "encoder.model.") if pretraining else (model, "")  # type: ignore[union-attr]
    )
    depths = [len(blocks) for blocks in stages_of(timm_model)]
    exempt = not_decayed(timm_model, pretraining) if isinstance(model, SimMIM) or not pretraining else set()
    top = sum(depths) + 1
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for full_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        name = full_name.removeprefix(prefix)
        decayed = parameter.ndim > 1 and not name.endswith(".bias") and name not in exempt
        layer = layer_id(name, depths) if layer_decay < 1 else top
        group = {"params": [], "lr": lr * layer_decay ** (top - layer), "weight_decay": weight_decay * decayed}
        groups.setdefault((layer, decayed), group)["params"].append(parameter)
    return list(groups.values())


def create_optimizer(groups: list[dict[str, Any]], beta2: float = 0.999) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, betas=(0.9, beta2), eps=1e-8, fused=True)


def create_schedule(
    optimizer: torch.optim.Optimizer, settings: "TrainSettings", steps_per_epoch: int
) -> CosineLRScheduler | MultiStepLRScheduler:
    """A timm scheduler; call its ``step_update(step)`` before each step, counting from 0.

    Reads ``schedule``, ``epochs``, ``warmup_epochs``, ``base_warmup_lr``, ``base_min_lr``, ``batch_size`` and
    ``decay_epoch`` of the loop's settings. ``"cosine"`` falls to the minimum over the run; ``"step"`` multiplies by
    0.1 at ``decay_epoch``.
    """
    common: dict[str, Any] = {
        "warmup_t": round(settings.warmup_epochs * steps_per_epoch),
        "warmup_lr_init": scale_rate(settings.base_warmup_lr, settings.batch_size),
        "warmup_prefix": False,
        "t_in_epochs": False,
    }
    if settings.schedule == "step":
        milestone = settings.decay_epoch * steps_per_epoch + 1  # timm counts milestones from 1
        return MultiStepLRScheduler(optimizer, decay_t=[milestone], decay_rate=0.1, **common)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(1, settings.epochs * steps_per_epoch),
        lr_min=scale_rate(settings.base_min_lr, settings.batch_size),
        **common,
    )
