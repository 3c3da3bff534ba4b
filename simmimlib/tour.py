"""What ``notebooks/00_tour.ipynb`` starts from: one picture and an untrained encoder."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from simmimlib.batches import normaliser
from simmimlib.data import Packed
from simmimlib.encoders import Encoder, create_encoder
from simmimlib.masking import MaskGenerator
from simmimlib.settings import Settings, require


@dataclass
class TourSettings(Settings):
    """Settings of the tour; every value is explained in the notebook's parameters cell."""

    picture: str = ""
    encoder: str = "swin_tiny_patch4_window7_224"
    encoder_kwargs: dict = field(default_factory=lambda: {"window_size": 6})
    image_size: int = 192
    mask_patch_size: int = 32
    mask_ratio: float = 0.6
    seed: int = 0

    def check(self):
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
        image = image.crop((left, top, left + side, top + side)).resize((self.image_size,) * 2, Image.BICUBIC)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
        mean, std = list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)
        packed = Packed("picture", [], self.image_size, 3, mean, std, None, None)
        mean, std = normaliser(packed, pixels.device)
        return packed, (pixels - mean) / std
