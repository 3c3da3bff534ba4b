"""Losses of an epoch, kept on the device until somebody looks: no step waits for its loss."""

import math

import torch
from torch import Tensor

from simmimlib.machine.distributed import sum_over_ranks, world_size

CHECK_STEPS = 20  # losses are fetched from the device, and looked at, every so many steps


class LossWatch:
    """Losses and gradient norms of the current epoch, on the device."""

    def __init__(self, steps: int, device: torch.device):
        self.steps, self.checked = steps, 0  # of an epoch; of them those whose losses were looked at
        self.values = torch.full((2, max(1, steps)), math.nan, device=device)

    def note(self, i: int, loss: Tensor, norm: Tensor) -> None:
        """Of the epoch's step ``i``, from 0."""
        self.values[0, i], self.values[1, i] = loss, norm

    def due(self, done: int, stop: list) -> bool:
        """Processes have to agree on when to look; one alone can stop at once."""
        return done % CHECK_STEPS == 0 or done == self.steps or (bool(stop) and world_size() == 1)

    def fetch(self, done: int, stop: list) -> tuple[list[tuple[int, float, float]], bool]:
        """The epoch's steps since the last look, each with its loss, the mean over all processes, and its norm of the
        gradient; and whether a signal came to one of the processes.
        """
        start = self.checked
        news = torch.cat([self.values[0, start:done], self.values.new_tensor([float(bool(stop))])])
        news = sum_over_ranks(news) / world_size()
        self.values[0, start:done] = news[:-1]
        losses, norms = self.values[:, start:done].tolist()
        self.checked = done
        return list(zip(range(start, done), losses, norms, strict=True)), news[-1].item() > 0

    def means(self, left_out: list[int]) -> dict[str, float]:
        """Mean loss and mean gradient norm of the epoch, without the steps that were left out."""
        kept = [i for i in range(self.steps) if i not in left_out]
        losses, norms = (values[: self.steps].tolist() for values in self.values)
        mean = [sum(values[i] for i in kept) / len(kept) if kept else math.nan for values in (losses, norms)]
        return {"loss": mean[0], "grad_norm": mean[1]}

    def state(self) -> dict:
        return {"values": self.values, "checked": self.checked}

    def restore(self, state: dict) -> None:
        self.values, self.checked = state["values"], state["checked"]
