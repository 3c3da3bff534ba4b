"""What can go wrong in a run: a loss that is not finite, memory that does not suffice, a signal to stop."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from simmimlib.machine.distributed import sum_over_ranks, world_size

if TYPE_CHECKING:
    from simmimlib.train.run import Run

CHECK_STEPS = 20  # losses are fetched from the device, and looked at, every so many steps


class NotFinite(FloatingPointError):
    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class LossWatch:
    """Losses and gradient norms of the current epoch, on the device: no step waits for its loss."""

    def __init__(self, steps: int, device: torch.device):
        self.steps, self.checked = steps, 0  # of an epoch; of them those whose losses were looked at
        self.values = torch.full((2, max(1, steps)), math.nan, device=device)

    def note(self, i: int, loss: Tensor, norm: Tensor) -> None:
        """Of the epoch's step ``i``, from 0."""
        self.values[0, i], self.values[1, i] = loss, norm

    def due(self, done: int, stop: list) -> bool:
        """Processes have to agree on when to look; one alone can stop at once."""
        return done % CHECK_STEPS == 0 or done == self.steps or (bool(stop) and world_size() == 1)

    def check(self, run: "Run", done: int) -> bool:
        """Fetches the losses since the last check, of all processes. True if a signal came to one of them.

        Raises:
            NotFinite: a loss or a gradient is not finite.
        """
        start, first = self.checked, run.step - done
        news = torch.cat([self.values[0, start:done], self.values.new_tensor([float(bool(run.stop))])])
        news = sum_over_ranks(news) / world_size()
        self.values[0, start:done] = news[:-1]
        losses, norms = self.values[:, start:done].tolist()
        for i, (loss, norm) in enumerate(zip(losses, norms, strict=True), start):
            if not (math.isfinite(loss) and math.isfinite(norm)) and first + i not in run.skipped:
                raise NotFinite(what_happened(run, first + i, loss, norm), first + i)
        self.checked = done
        run.progress.show(loss=losses[-1] if losses else math.nan, lr=run.rate)
        return news[-1].item() > 0

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


def what_happened(run: "Run", step: int, loss: float, norm: float) -> str:
    epoch, i = divmod(step, len(run.batches))
    run.schedule.step_update(step)
    rows = run.batches.rows(epoch)[i].tolist()
    some = ", ".join(map(str, rows[:8])) + ", ..." * (len(rows) > 8)
    return (
        f"the loss is {loss} and the norm of the gradient {norm} at step {step} (epoch {epoch + 1}, batch {i + 1} "
        f"of {len(run.batches)}, learning rate {run.rate:.3g}, rows {some} of the training images). The last good "
        f"checkpoint is {run.rolling.files()[0]}: start the run again with skip_nonfinite = {len(run.skipped) + 1} "
        "to resume from it without that batch, or with a lower base_lr or clip_grad to start anew"
    )


@contextlib.contextmanager
def explain_out_of_memory(run: "Run", inputs: tuple[Tensor, ...], forward_backward: Callable) -> Iterator[None]:
    """Says how many images at a time would have fitted where a batch does not fit into the memory."""
    try:
        yield
        return
    except torch.OutOfMemoryError as error:
        cause = str(error)
    # outside of the handler, whose traceback would keep the tensors alive
    raise torch.OutOfMemoryError(f"{cause}\n{what_fits(run, inputs, forward_backward)}")


def what_fits(run: "Run", inputs: tuple[Tensor, ...], forward_backward: Callable) -> str:
    """Tries smaller parts of the batch that did not fit into memory."""
    count = len(inputs[0])
    part = math.ceil(count / run.parts)
    while part > 1:
        part = math.ceil(part / 2)
        run.optimizer.zero_grad()
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            with run.no_sync():
                forward_backward(run, tuple(tensor[:part] for tensor in inputs), 1)
        except torch.OutOfMemoryError:
            continue
        return (
            f"{count} images a step on {run.device} do not fit; {part} at a time do: set the environment variable "
            f"SIMMIM_MICRO_BATCH={part}. Gradients are then summed over {math.ceil(count / part)} parts and the "
            "result is the same within rounding"
        )
    return f"not even one image at a time fits into the memory of {run.device}"
