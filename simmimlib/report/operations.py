"""What a forward pass costs, counted."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from simmimlib.model.masking import MaskGenerator
from simmimlib.model.mim import MaskedImageModel


@torch.no_grad()
def forward_operations(model: MaskedImageModel, masks: MaskGenerator) -> int:
    """Multiplications and additions of products and convolutions in pre-training's forward pass of one image."""
    model.eval()
    config = model.encoder.config
    size = config["image_size"]
    height, width = (size, size) if isinstance(size, int) else size
    images, mask = torch.zeros(1, config["in_chans"], height, width), masks(1)
    # torch counts attention's products where they are written out
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.predict(images, mask)
    return counter.get_total_flops()
