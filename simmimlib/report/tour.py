"""What ``notebooks/00_tour.ipynb`` starts from: one picture and an untrained encoder, crops for a trained one."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from simmimlib.data.packed import Packed, Split
from simmimlib.data.packed_images import normaliser
from simmimlib.model.encoders import Encoder, create_encoder, is_convnext
from simmimlib.model.masking import MaskGenerator
from simmimlib.settings import Settings, require, setting

# the default of the profile cifar10-cpu, seed 0, and its card: results/cifar10-cpu/weights/README.md
TRAINED = "results/cifar10-cpu/weights/pretrain/model.safetensors"


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
            encoder = self.build_encoder()
        known = "a ViT, DeiT, BEiT, Swin or SwinV2, whose tokens can be shown"
        require(not is_convnext(encoder.model), "encoder", self.encoder, known)
        self.patch_size = encoder.patch_size
        MaskGenerator(self.image_size, self.mask_patch_size, self.patch_size, self.mask_ratio)

    def build_encoder(self) -> Encoder:
        return create_encoder(self.encoder, self.image_size, **self.encoder_kwargs).eval()

    def load_picture(self) -> tuple[Packed, torch.Tensor]:
        """The picture's normalisation, and the picture itself: normalised, [1, 3, image_size, image_size]."""
        image = Image.open(self.picture).convert("RGB") if self.picture else photograph("china.jpg")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return normalised([image.crop((left, top, left + side, top + side))], self.image_size)


def photograph(name: str) -> Image.Image:
    """One of the two photographs that scikit-learn ships: ``"china.jpg"`` or ``"flower.jpg"``, 640 x 427."""
    from sklearn.datasets import load_sample_image  # imported here: only for its photographs

    return Image.fromarray(load_sample_image(name))


def small_pictures(size: int, side: int = 213) -> tuple[Packed, torch.Tensor]:
    """Crops of ``side`` pixels of both photographs, side by side, in rows half a crop apart, scaled to ``size``.

    Returns:
        Their normalisation, ImageNet's, and the pictures, normalised, [n, 3, size, size]: 18 of 213 pixels.
    """
    crops = []
    for image in (photograph("china.jpg"), photograph("flower.jpg")):
        for top in range(0, image.height - side + 1, side // 2):
            for left in range(0, image.width - side + 1, side):
                crops.append(image.crop((left, top, left + side, top + side)))
    return normalised(crops, size)


def normalised(crops: list[Image.Image], size: int) -> tuple[Packed, torch.Tensor]:
    """Square pictures at ``size`` pixels, normalised by ImageNet's statistics: these, and [n, 3, size, size]."""
    small = [np.array(crop.resize((size, size), Image.Resampling.BICUBIC)) for crop in crops]
    pixels = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float()
    mean, std = list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)
    nothing = Split(*[np.empty(0)] * 4)
    packed = Packed("picture", [], size, 3, mean, std, "", nothing, nothing)
    shift, scale = normaliser(packed, pixels.device)
    return packed, (pixels - shift) / scale
