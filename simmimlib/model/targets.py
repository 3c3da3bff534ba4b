"""Prediction targets and losses (paper section 3.5, equation 1): raw pixels, and colours as classes.

A target says how many channels the head must predict for a pixel, scores a prediction value by value, and turns a
prediction back into normalised pixels for showing. Images come in normalised; ``mean`` and ``std`` are the ones they
were normalised with.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOSSES = ("l1", "l2", "smooth_l1")
SCOPES = ("masked", "all")
TARGETS = ("pixels", "normalised_pixels", "bins_8", "bins_256", "clusters_512")


def create_target(
    name: str,
    in_chans: int = 3,
    loss: str = "l1",
    beta: float = 1.0,
    patch: int = 32,
    mean: float | list[float] = 0.5,
    std: float | list[float] = 0.25,
) -> "PixelTarget | BinTarget | ClusterTarget":
    """A target by name.

    Args:
        name: ``"pixels"``; ``"normalised_pixels"`` (of each ``patch`` x ``patch`` square, by its own mean and unbiased
            variance, as MAE does); ``"bins_8"``, ``"bins_256"`` (each channel's range cut into equal bins);
            ``"clusters_512"`` (the nearest of 512 colours, which ``ClusterTarget.fit`` finds).
        loss, beta: of the pixel targets; the others have cross-entropy.
        mean, std: numbers, or one per channel, that images were normalised with.

    Raises:
        ValueError: an unknown name.
    """
    if name not in TARGETS:
        raise ValueError(f"target = {name!r}: allowed are {', '.join(TARGETS)}")
    kind, _, count = name.partition("_")
    if kind == "bins":
        return BinTarget(int(count), in_chans, mean, std)
    if kind == "clusters":
        return ClusterTarget(int(count), in_chans)
    return PixelTarget(in_chans, loss, beta, patch if kind == "normalised" else None)


class PixelTarget(nn.Module):
    """Normalised pixels; with ``patch``, normalised once more within each patch."""

    def __init__(self, channels: int, loss: str, beta: float, patch: int | None):
        super().__init__()
        if loss not in LOSSES:
            raise ValueError(f"loss = {loss!r}: allowed are {', '.join(LOSSES)}")
        if patch == 1 and channels == 1:
            raise ValueError("target = 'normalised_pixels': a patch of one value has no variance; predict more pixels")
        self.channels, self.loss, self.beta, self.patch = channels, loss, beta, patch

    def errors(self, prediction: Tensor, images: Tensor) -> Tensor:
        """prediction, images [B, C, H, W] -> error of each value, the same shape."""
        if self.patch:
            mean, std = self._statistics(images)
            images = (images - mean) / std
        return pixel_errors(prediction, images, self.loss, self.beta)

    def pixels(self, prediction: Tensor, images: Tensor) -> Tensor:
        """Normalised pixels [B, C, H, W]; per-patch normalisation is undone with the true patch's statistics."""
        if not self.patch:
            return prediction
        mean, std = self._statistics(images)
        return prediction * std + mean

    def _statistics(self, images: Tensor) -> Iterator[Tensor]:
        height, width = images.shape[2:]
        patches = F.pixel_unshuffle(images, self.patch)  # type: ignore[arg-type]  # [B, C * patch * patch, h, w]
        mean, variance = patches.mean(1, keepdim=True), patches.var(1, keepdim=True)
        return (F.interpolate(v, (height, width)) for v in (mean, (variance + 1e-6).sqrt()))


class BinTarget(nn.Module):
    """Each channel of each pixel is one of ``bins`` classes; the paper's "color binning"."""

    mean: Tensor  # [1, C, 1, 1]
    std: Tensor

    def __init__(self, bins: int, in_chans: int, mean: float | list[float], std: float | list[float]):
        super().__init__()
        self.bins, self.in_chans, self.channels = bins, in_chans, bins * in_chans
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.as_tensor(value).float().expand(in_chans).clone().view(1, -1, 1, 1))

    def errors(self, prediction: Tensor, images: Tensor) -> Tensor:
        """prediction [B, C * bins, H, W], images [B, C, H, W] -> cross-entropy [B, C, H, W]."""
        return F.cross_entropy(self._logits(prediction), self._classes(images), reduction="none")

    def pixels(self, prediction: Tensor, images: Tensor) -> Tensor:
        """The middle of the likeliest bin, normalised."""
        return self._colours(self._logits(prediction).argmax(1))

    def best(self, images: Tensor) -> Tensor:
        """What a perfect prediction looks like, normalised."""
        return self._colours(self._classes(images))

    def _classes(self, images: Tensor) -> Tensor:
        return ((images * self.std + self.mean) * self.bins).long().clamp(0, self.bins - 1)

    def _colours(self, classes: Tensor) -> Tensor:
        return ((classes + 0.5) / self.bins - self.mean) / self.std

    def _logits(self, prediction: Tensor) -> Tensor:
        return prediction.unflatten(1, (self.bins, self.in_chans))  # [B, bins, C, H, W]


class ClusterTarget(nn.Module):
    """Each pixel is the nearest of ``clusters`` colours, as in iGPT; the colours are stored with the model."""

    colours: Tensor  # [clusters, C]

    def __init__(self, clusters: int, in_chans: int):
        super().__init__()
        self.channels = clusters
        self.register_buffer("colours", torch.zeros(clusters, in_chans))

    def fit(self, images: Tensor) -> None:
        """Finds the colours by k-means on normalised training images [N, C, H, W] (at most 200,000 pixels of them)."""
        from sklearn.cluster import MiniBatchKMeans  # imported here: only this target needs it

        pixels = images.permute(0, 2, 3, 1).flatten(0, 2).cpu()
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))[:200_000]
        means = MiniBatchKMeans(len(self.colours), batch_size=4096, n_init=1, random_state=0).fit(pixels[order].numpy())
        self.colours.copy_(torch.from_numpy(means.cluster_centers_))

    def errors(self, prediction: Tensor, images: Tensor) -> Tensor:
        """prediction [B, clusters, H, W], images [B, C, H, W] -> cross-entropy [B, 1, H, W]."""
        return F.cross_entropy(prediction, self._classes(images), reduction="none").unsqueeze(1)

    def pixels(self, prediction: Tensor, images: Tensor) -> Tensor:
        """The likeliest colour, normalised."""
        return self.colours[prediction.argmax(1)].permute(0, 3, 1, 2)

    def best(self, images: Tensor) -> Tensor:
        """What a perfect prediction looks like, normalised."""
        return self.colours[self._classes(images)].permute(0, 3, 1, 2)

    def _classes(self, images: Tensor) -> Tensor:
        pixels = images.permute(0, 2, 3, 1)
        return torch.cdist(pixels.flatten(1, 2), self.colours).argmin(2).view(pixels.shape[:3])


def pixel_errors(prediction: Tensor, target: Tensor, loss: str, beta: float = 1.0) -> Tensor:
    """Error of each value, [B, C, H, W]; ``beta`` is where smooth-L1 turns from quadratic to linear."""
    if loss == "l1":
        return (prediction - target).abs()
    if loss == "l2":
        return (prediction - target).square()
    if loss == "smooth_l1":
        return F.smooth_l1_loss(prediction, target, reduction="none", beta=beta)
    raise ValueError(f"loss = {loss!r}: allowed are {', '.join(LOSSES)}")


def scoped_mean(errors: Tensor, pixel_mask: Tensor, scope: str) -> Tensor:
    """Mean of ``errors`` [B, C, H, W] over the masked pixels of ``pixel_mask`` [B, 1, H, W], or over all pixels.

    Over the masked pixels of the whole *batch*, as the official code does, not of each image first; its guard against
    an empty mask is the ``1e-5`` in the denominator.
    """
    if scope == "all":
        return errors.mean()
    if scope != "masked":
        raise ValueError(f"scope = {scope!r}: allowed are {', '.join(SCOPES)}")
    pixel_mask = pixel_mask.to(errors.dtype)
    return (errors * pixel_mask).sum() / (pixel_mask.sum() + 1e-5) / errors.shape[1]
