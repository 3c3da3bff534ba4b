"""Masking strategies (paper section 3.2).

A mask is decided on a grid of *mask patches* (32 x 32 pixels in the paper) and then repeated up to the encoder's
token grid, so that one mask patch hides a whole block of tokens: 32-pixel mask patches over Swin's 4-pixel tokens
hide blocks of 8 x 8. True always means masked.
"""

import math

import torch
from torch import Tensor

STRATEGIES = ("random", "square", "block")


class MaskGenerator:
    """Draws boolean masks, a batch at a time.

    Args:
        image_size: side of the image in pixels, or (height, width).
        mask_patch_size: side of a mask patch in pixels.
        model_patch_size: side of one token of the encoder in pixels (``encoder.patch_size``).
        ratio: share of the mask patches to hide, in (0, 1]. Of n patches, ``ceil(n * ratio)`` are masked in every
            image, as the official code does: 22 of 36 at 192 pixels, patch 32, ratio 0.6.
        strategy: ``"random"`` (each patch by itself, the paper's default), ``"square"`` (one square region at a
            random place; where the count is no square number the end of the square's last row stays visible) or
            ``"block"`` (rectangles of random area and aspect ratio until the count is reached, in the manner of BEiT).

    Raises:
        ValueError: a size that does not divide, a ratio outside (0, 1], an unknown strategy.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        mask_patch_size: int = 32,
        model_patch_size: int = 4,
        ratio: float = 0.6,
        strategy: str = "random",
    ):
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height % mask_patch_size or width % mask_patch_size:
            raise ValueError(
                f"image_size = {image_size}: must be a multiple of mask_patch_size = {mask_patch_size}, "
                f"for example {max(1, round(height / mask_patch_size)) * mask_patch_size}"
            )
        if mask_patch_size % model_patch_size:
            raise ValueError(
                f"mask_patch_size = {mask_patch_size}: must be a multiple of the model's patch size {model_patch_size}"
            )
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio = {ratio}: must be above 0 and at most 1 (the share of patches to mask)")
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy = {strategy!r}: allowed are {', '.join(STRATEGIES)}")
        self.grid = height // mask_patch_size, width // mask_patch_size
        self.repeat = mask_patch_size // model_patch_size  # tokens per mask patch, along one side
        self.count = math.ceil(math.prod(self.grid) * ratio)
        self.hidden = self.count * self.repeat**2  # tokens of each image
        self.strategy = strategy

    def __call__(
        self,
        batch_size: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draws [B, H / model_patch_size, W / model_patch_size] booleans, True where masked.

        With a ``generator`` the same state gives the same masks; numbers are drawn on the generator's device and
        moved to ``device`` (default: the generator's, else the CPU).
        """
        source = generator.device if generator is not None else device
        draw = {"random": self._random, "square": self._square, "block": self._block}[self.strategy]
        mask = draw(batch_size, {"generator": generator, "device": source})  # [B, gh, gw]
        mask = mask.to(device, non_blocking=True) if device is not None else mask  # while it is still small
        return mask.repeat_interleave(self.repeat, 1).repeat_interleave(self.repeat, 2)

    def _random(self, batch_size: int, where: dict) -> Tensor:
        noise = torch.rand(batch_size, math.prod(self.grid), **where)
        return self._first(noise)

    def _square(self, batch_size: int, where: dict) -> Tensor:
        grid_h, grid_w = self.grid
        side_h = min(math.isqrt(self.count - 1) + 1, grid_h)
        side_h = max(side_h, math.ceil(self.count / grid_w))  # a wide region on grids too narrow for the square
        side_w = math.ceil(self.count / side_h)
        top, left = (torch.rand(2, batch_size, 1, 1, **where) * self._room(side_h, side_w, where)).long()
        rows, cols = self._coordinates(where["device"])
        inside = (rows >= top) & (rows < top + side_h) & (cols >= left) & (cols < left + side_w)
        order = (rows * grid_w + cols).masked_fill(~inside, grid_h * grid_w)
        return self._first(order.flatten(1))

    def _block(self, batch_size: int, where: dict) -> Tensor:
        # Each rectangle hides its patches in reading order; the mask is the first `count` patches hidden so. BEiT's
        # numbers: at least 4 patches a rectangle, aspect ratio log-uniform between 0.3 and 1 / 0.3. A rectangle
        # covers a random patch that is still visible, so that each one hides something and the loop ends.
        grid_h, grid_w = self.grid
        cells = grid_h * grid_w
        rows, cols = self._coordinates(where["device"])
        raster = rows * grid_w + cols
        never = torch.iinfo(torch.long).max
        order = torch.full((batch_size, grid_h, grid_w), never, device=where["device"])
        step = 0
        while (left_over := self.count - (order < never).sum((1, 2))).max() > 0:
            u_area, u_aspect, u_top, u_left = torch.rand(4, batch_size, 1, 1, **where)
            smallest = min(4, self.count)
            area = smallest + u_area * (left_over.view(-1, 1, 1) - smallest).clamp(min=0)
            aspect = torch.exp((2 * u_aspect - 1) * math.log(1 / 0.3))
            height = (area * aspect).sqrt().round().clamp(1, grid_h)
            width = (area / aspect).sqrt().round().clamp(1, grid_w)
            noise = torch.rand(batch_size, cells, **where).masked_fill(order.flatten(1) < never, -1)
            anchor = noise.argmax(1).view(-1, 1, 1)
            top = (anchor // grid_w - (u_top * height).floor()).clamp(min=0).minimum(grid_h - height)
            left = (anchor % grid_w - (u_left * width).floor()).clamp(min=0).minimum(grid_w - width)
            inside = (rows >= top) & (rows < top + height) & (cols >= left) & (cols < left + width)
            order = torch.where(inside & (order == never), step * cells + raster, order)
            step += 1
        return self._first(order.flatten(1))

    def _first(self, order: Tensor) -> Tensor:
        """Masks the ``count`` patches that come first in ``order`` [B, n]."""
        chosen = order.argsort(dim=1)[:, : self.count]
        mask = torch.zeros(order.shape, dtype=torch.bool, device=order.device).scatter_(1, chosen, True)
        return mask.view(-1, *self.grid)

    def _coordinates(self, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
        grid_h, grid_w = self.grid
        return torch.arange(grid_h, device=device).view(1, -1, 1), torch.arange(grid_w, device=device).view(1, 1, -1)

    def _room(self, height: int, width: int, where: dict) -> Tensor:
        room = [self.grid[0] - height + 1, self.grid[1] - width + 1]
        return torch.tensor(room, device=where["device"]).view(2, 1, 1, 1)


def upsample_mask(mask: Tensor, patch_size: int) -> Tensor:
    """Token mask [B, h, w] to pixel mask [B, 1, h * patch_size, w * patch_size]."""
    return mask.repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2).unsqueeze(1)


def check_mask(mask: Tensor, images: Tensor, patch_size: int) -> None:
    """Raises ValueError unless the mask is [B, H / patch_size, W / patch_size] for images [B, C, H, W]."""
    expected = (len(images), images.shape[2] // patch_size, images.shape[3] // patch_size)
    if mask.shape != expected:
        raise ValueError(f"mask of shape {tuple(mask.shape)}: must be {expected}")
