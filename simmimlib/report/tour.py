"""What ``notebooks/00_tour.ipynb`` starts from: one picture and an untrained encoder."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from simmimlib.data.packed import Packed, Split
from simmimlib.data.packed_images import normaliser
from simmimlib.model.encoders import Encoder, create_encoder
from simmimlib.model.masking import MaskGenerator
from simmimlib.settings import Settings, require, setting


@dataclass
class TourSettings(Settings):
    """Settings of ``notebooks/00_tour.ipynb``."""

    picture: str = setting("", "path of a picture of your own; empty means one scikit-learn ships")
    encoder: str = setting("swin_tiny_patch4_window7_224", "timm's ViT, DeiT, BEiT, Swin or SwinV2")
    encoder_kwargs: dict = setting({"window_size": 6}, "changes to that timm model")  # noqa: RUF009
    image_size: int = setting(192, "pixels, a multiple of mask_patch_size and the encoder's stride")
    mask_patch_size: int = setting(32, "side of a mask patch, pixels; n times the encoder's")
    mask_ratio: float = setting(0.6, "share of the mask patches to hide, above 0 and at most 1")
    seed: int = setting(0, "of the masks and of the untrained weights")

    def check(self) -> None:
        require(not self.picture or Path(self.picture).is_file(), "picture", self.picture, "an image file, or empty")
        with torch.device("meta"):
            self.patch_size = self.build_encoder().patch_size
        MaskGenerator(self.image_size, self.mask_patch_size, self.patch_size, self.mask_ratio)

    def build_encoder(self) -> Encoder:
        return create_encoder(self.encoder, self.image_size, **self.encoder_kwargs).eval()

    def load_picture(self) -> tuple[Packed, torch.Tensor]:
        """The picture's normalisation, and the picture itself: normalised, [1, 3, image_size, image_size]."""
        if self.picture:
            image = Image.open(self.picture).convert("RGB")
        else:
            from sklearn.datasets import load_sample_image  # imported here: only for its photograph

            image = Image.fromarray(load_sample_image("china.jpg"))
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize(
            (self.image_size,) * 2, Image.Resampling.BICUBIC
        )
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
        mean, std = list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)
        nothing = Split(*[np.empty(0)] * 4)
        packed = Packed("picture", [], self.image_size, 3, mean, std, "", nothing, nothing)
        shift, scale = normaliser(packed, pixels.device)
        return packed, (pixels - shift) / scale
