"""What can be set: the settings of pre-training, fine-tuning and probes.

Device, number of processes and memory are none of them: they are found when a run starts (``machine/device.py``).
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from simmimlib.data.batches import SOURCES
from simmimlib.data.crops import INTERPOLATIONS
from simmimlib.machine.device import PRECISIONS
from simmimlib.model.encoders import POSITIONS, Encoder, create_encoder
from simmimlib.model.fcmae import FCMAE
from simmimlib.model.heads import HEADS
from simmimlib.model.mae import MAE, init_mae
from simmimlib.model.masking import STRATEGIES, MaskGenerator
from simmimlib.model.mim import MaskedImageModel
from simmimlib.model.simmim import SimMIM
from simmimlib.model.targets import LOSSES, SCOPES, TARGETS
from simmimlib.settings import Settings, one_of, require, setting
from simmimlib.train.features import check_block
from simmimlib.weights.checkpoints import METHODS, load_model

SCHEDULES = ("cosine", "step")
SMALL_VIT = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}


@dataclass
class RunSettings(Settings):
    """The settings that every run has."""

    data: str = setting("mnist5k", "a folder packed by 01_data; mnist5k is packed on first use")
    encoder: str = setting("vit_tiny_patch16_224", "timm's ViT, Swin, ConvNeXtV2 | simmim_vit_base")
    encoder_kwargs: dict = setting(SMALL_VIT, "changes to that timm model")  # noqa: RUF009
    image_size: int = setting(32, "pixels, a multiple of the encoder's stride")
    precision: str = setting("auto", "auto (bfloat16 on a GPU that has it) | float32 | bfloat16")
    seed: int = setting(0, "of everything random")
    out: str = setting("", "folder for the results, from the project root")

    def check(self) -> None:
        one_of("precision", self.precision, PRECISIONS)
        require(self.seed >= 0, "seed", self.seed, "0 or more")


@dataclass
class TrainSettings(RunSettings):
    """The recipe that pre-training and fine-tuning share. Rates are for a batch of 512 images and scale with it."""

    epochs: int = setting(12, "passes over the training images")
    batch_size: int = setting(32, "images a step, over all devices")
    base_lr: float = setting(1.0e-3, "peak learning rate for a batch of 512; scales with the batch")
    base_warmup_lr: float = setting(1.0e-4, "where the warm-up starts, for a batch of 512")
    base_min_lr: float = setting(1.0e-4, "where the cosine ends, for a batch of 512")
    warmup_epochs: float = setting(1.0, "epochs of linear warm-up")
    schedule: str = setting("cosine", "cosine | step (a tenth of the rate from decay_epoch on)")
    decay_epoch: int = setting(0, "the epoch of the step schedule's step")
    weight_decay: float = setting(0.05, "of AdamW")
    beta2: float = setting(0.999, "of AdamW (MAE, FCMAE: 0.95 in pre-training)")
    drop_path: float = setting(0.0, "stochastic depth of the encoder, 0 to 1")
    clip_grad: float = setting(5.0, "largest norm of the gradient")
    crop_scale: float = setting(1.0, "least share of the area a random crop keeps; 1 means no crop")
    flip: bool = setting(False, "flip half of the images horizontally")
    source: str = setting("packed", "packed (the arrays) | files (decoded anew each epoch; slower)")
    deterministic: bool = setting(False, "on a GPU too, the same numbers each time; slower there")
    skip_nonfinite: int = setting(0, "so many batches of non-finite loss are left out; 0 means stop")

    def check(self) -> None:
        super().check()
        one_of("schedule", self.schedule, SCHEDULES)
        one_of("source", self.source, SOURCES)
        require(0 < self.crop_scale <= 1, "crop_scale", self.crop_scale, "above 0 and at most 1")
        require(0 <= self.drop_path < 1, "drop_path", self.drop_path, "from 0 to below 1")
        for name in ("clip_grad", "batch_size"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in ("base_lr", "base_warmup_lr", "base_min_lr", "warmup_epochs", "weight_decay", "epochs"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(0 < self.beta2 < 1, "beta2", self.beta2, "above 0 and below 1")
        stepped = self.schedule == "step"
        allowed = "above 0 with schedule = step, the epoch of its step" if stepped else "0 with schedule = cosine"
        require((self.decay_epoch > 0) == stepped and self.decay_epoch >= 0, "decay_epoch", self.decay_epoch, allowed)
        require(self.skip_nonfinite >= 0, "skip_nonfinite", self.skip_nonfinite, "0 (stop) or more")


@dataclass
class PretrainSettings(TrainSettings):
    """Settings of ``pretrain`` (paper section 4.1)."""

    method: str = setting("simmim", "simmim | mae (encoder: a ViT) | fcmae (encoder: a ConvNeXtV2)")
    mask_patch_size: int = setting(8, "side of a mask patch, pixels (paper: 32 at 192)")
    mask_ratio: float = setting(0.5, "share of the mask patches to hide (paper: 0.6)")
    mask_strategy: str = setting("random", "random | square | block")
    positions: str = setting("", "of a ViT: learned | sincos; empty: sincos with mae, else learned")
    weight_init: str = setting("", "timm | mae (of a ViT); empty: mae with mae, else timm")
    head: str = setting("linear", "linear | mlp | blocks_1, _2, _4, _8 | inverse_swin_t, _b")
    decoder_width: int = setting(0, "of mae, fcmae, head blocks_n; 0: encoder's / 2, / 2, / 1")
    decoder_depth: int = setting(1, "mae, fcmae: blocks of the decoder (official: mae 8, fcmae 1)")
    decoder_heads: int = setting(0, "of mae, head blocks_n; 0: one for 32, for 64 channels")
    loss: str = setting("l1", "l1 | l2 | smooth_l1")
    beta: float = setting(1.0, "where smooth_l1 turns from quadratic to linear")
    scope: str = setting("masked", "masked (predict what is hidden) | all (reconstruct everything)")
    target: str = setting("pixels", "pixels | normalised_pixels | bins_8 | bins_256 | clusters_512")
    resolution: float = setting(1.0, "side of the predicted image as a share of the input")
    base_lr: float = setting(0.064)
    out: str = setting("results/try/pretrain")

    # of the crops: what the official code does, and no settings here
    interpolation, auto_augment, color_jitter = "bilinear", "", 0.0

    def check(self) -> None:
        super().check()
        one_of("method", self.method, METHODS)
        one_of("positions", self.positions, ("", *POSITIONS))
        one_of("weight_init", self.weight_init, ("", "timm", "mae"))
        one_of("head", self.head, HEADS)
        one_of("loss", self.loss, LOSSES)
        one_of("scope", self.scope, SCOPES)
        one_of("target", self.target, TARGETS)
        one_of("mask_strategy", self.mask_strategy, STRATEGIES)
        require(0 < self.mask_ratio <= 1, "mask_ratio", self.mask_ratio, "above 0 and at most 1")
        for name in ("decoder_width", "decoder_heads"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(self.decoder_depth > 0, "decoder_depth", self.decoder_depth, "1 or more")
        for name in ("positions", "mask_token"):
            allowed = f"without {name}, which the settings method and positions decide"
            require(name not in self.encoder_kwargs, "encoder_kwargs", self.encoder_kwargs, allowed)
        with torch.device("meta"):  # names and sizes that do not fit stop here, before any data is read
            encoder = self.model().encoder
            masks = self.masks(encoder.patch_size)
        if self.method == "simmim":
            allowed = "1 with method = simmim, where head = blocks_n says the depth"
            require(self.decoder_depth == 1, "decoder_depth", self.decoder_depth, allowed)
            return
        own = "mae" if self.method == "mae" else "timm"
        require(self.weight_init in ("", own), "weight_init", self.weight_init, f"{own} with method = {self.method}")
        require(self.head == "linear", "head", self.head, f"linear with method = {self.method}, which has a decoder")
        require(self.resolution == 1, "resolution", self.resolution, f"1 with method = {self.method}")
        allowed = f"low enough to leave a patch visible with method = {self.method}"
        require(masks.count < math.prod(masks.grid), "mask_ratio", self.mask_ratio, allowed)
        if self.method == "fcmae":
            allowed = "0 with method = fcmae, whose decoder has no attention"
            require(self.decoder_heads == 0, "decoder_heads", self.decoder_heads, allowed)
            whole = self.mask_patch_size % encoder.stride == 0
            allowed = f"a multiple of {encoder.stride}, the encoder's stride, with method = fcmae"
            require(whole, "mask_patch_size", self.mask_patch_size, allowed)

    def model(
        self, in_chans: int = 3, mean: float | list[float] = 0.5, std: float | list[float] = 0.25
    ) -> MaskedImageModel:
        """The untrained model; ``mean`` and ``std`` are the data set's."""
        kwargs = {"drop_path_rate": self.drop_path, **self.encoder_kwargs}
        positions = self.positions or ("sincos" if self.method == "mae" else "learned")
        mask_token = self.method == "simmim"
        encoder = create_encoder(
            self.encoder, self.image_size, in_chans, mask_token=mask_token, positions=positions, **kwargs
        )
        scored: dict[str, Any] = {"loss": self.loss, "scope": self.scope, "target": self.target, "beta": self.beta}
        scored |= {"mean": mean, "std": std}
        if self.method == "fcmae":
            return FCMAE(encoder, self.decoder_width, self.decoder_depth, **scored)
        if self.method == "mae":
            masks = self.masks(encoder.patch_size)
            decoder = (self.decoder_width, self.decoder_depth, self.decoder_heads)
            model = MAE(encoder, *decoder, visible=math.prod(encoder.grid_size) - masks.hidden, **scored)
            init_mae(model)
            return model
        scored |= {"decoder_width": self.decoder_width, "decoder_heads": self.decoder_heads}
        simmim = SimMIM(encoder, self.head, resolution=self.resolution, **scored)
        if self.weight_init == "mae":
            init_mae(simmim)
        return simmim

    def masks(self, model_patch_size: int) -> MaskGenerator:
        return MaskGenerator(
            self.image_size, self.mask_patch_size, model_patch_size, self.mask_ratio, self.mask_strategy
        )


@dataclass
class CheckpointSettings(RunSettings):
    """What fine-tuning and probes share: the encoder that they start from, and labelled images."""

    checkpoint: str = setting("", "model.safetensors of 02_pretrain; empty means from scratch")
    labelled_images: int = setting(0, "of the training images, equally many a class; 0 means all")
    interpolation: str = setting("bilinear", "of crops: bilinear | bicubic")
    crop_pct: float = setting(1.0, "validation: centre crop's share of the shorter side (0.875)")

    def check(self) -> None:
        super().check()
        one_of("interpolation", self.interpolation, INTERPOLATIONS)
        require(0 < self.crop_pct <= 1, "crop_pct", self.crop_pct, "above 0 and at most 1")
        require(self.labelled_images >= 0, "labelled_images", self.labelled_images, "0 (all) or more")
        if not self.checkpoint:
            with torch.device("meta"):
                create_encoder(self.encoder, self.image_size, **self.encoder_kwargs)
        elif not Path(self.checkpoint).is_file():
            raise ValueError(f"checkpoint = {self.checkpoint!r}: there is no such file (empty = from scratch)")

    def start(self, in_chans: int) -> Encoder:
        """The checkpoint's encoder, or an untrained one."""
        if not self.checkpoint:
            return create_encoder(self.encoder, self.image_size, in_chans, **self.encoder_kwargs)
        encoder = load_model(self.checkpoint).encoder
        require(encoder.config["in_chans"] == in_chans, "data", self.data, "of the checkpoint's channel count")
        return encoder


@dataclass
class FinetuneSettings(CheckpointSettings, TrainSettings):
    """Settings of ``finetune`` (paper section 4.1)."""

    labelled_images: int = setting(1000)
    epochs: int = setting(30)
    base_lr: float = setting(0.064)
    warmup_epochs: float = setting(3.0)
    layer_decay: float = setting(1.0, "rate of a layer as a share of the rate of the layer above it")
    crop_scale: float = setting(0.85)
    auto_augment: str = setting("", "RandAugment of timm, as rand-m9-mstd0.5-inc1; empty means off")
    color_jitter: float = setting(0.0, "of timm, 0 to 1 (not used together with auto_augment)")
    random_erasing: float = setting(0.0, "probability of erasing a random rectangle")
    mixup: float = setting(0.0, "alpha of mixup; 0 means off")
    cutmix: float = setting(0.0, "alpha of cutmix; 0 means off")
    smoothing: float = setting(0.1, "label smoothing, from 0 to below 1")
    eval_epochs: int = setting(10, "validate every so many epochs, and after the last")
    out: str = setting("results/try/finetune")

    def check(self) -> None:
        super().check()
        require(0 < self.layer_decay <= 1, "layer_decay", self.layer_decay, "above 0 and at most 1")
        for name in ("random_erasing", "mixup", "cutmix", "color_jitter"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "from 0 to 1")
        require(0 <= self.smoothing < 1, "smoothing", self.smoothing, "from 0 to below 1")
        require(self.epochs > 0, "epochs", self.epochs, "1 or more")
        require(self.eval_epochs > 0, "eval_epochs", self.eval_epochs, "1 or more")
        mixes = self.mixup > 0 or self.cutmix > 0
        require(not mixes or self.batch_size % 2 == 0, "batch_size", self.batch_size, "even with mixup or cutmix")


@dataclass
class ProbeSettings(CheckpointSettings):
    """Settings of ``knn``, ``linear_probe`` and ``probe_blocks`` (paper section 4.2)."""

    block: int = setting(0, "whose output is read, from 1; 0 means the encoder's own output")
    k: int = setting(20, "nearest neighbours")
    temperature: float = setting(0.07, "of the neighbours' votes, exp(cosine / temperature)")
    raw_pixels: bool = setting(False, "probe_blocks: the raw pixels too, as a floor")
    batch_size: int = setting(500, "images at a time, over all devices")
    out: str = setting("results/try/probe")

    def check(self) -> None:
        super().check()
        for name in ("k", "temperature", "batch_size"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        require(self.block >= 0, "block", self.block, "0 or more")
        if not self.checkpoint:
            with torch.device("meta"):
                check_block(self.start(3).model, self.block)
