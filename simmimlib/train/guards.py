"""What can go wrong in a run: a loss that is not finite, memory that does not suffice, a signal to stop."""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from simmimlib.train.run import NotFinite, Run


def check_losses(run: Run, done: int) -> bool:
    """Looks at the losses since the last look, ``done`` steps into the epoch. True if a signal came to a process.

    Raises:
        NotFinite: a loss or a gradient is not finite.
    """
    first = run.step - done
    news, stopping = run.watch.fetch(done, run.stop)
    for i, loss, norm in news:
        if not (math.isfinite(loss) and math.isfinite(norm)) and first + i not in run.skipped:
            raise NotFinite(what_happened(run, first + i, loss, norm), first + i)
    run.progress.show(loss=news[-1][1] if news else math.nan, lr=run.rate)
    return stopping


def what_happened(run: Run, step: int, loss: float, norm: float) -> str:
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
def explain_out_of_memory(run: Run, inputs: tuple[Tensor, ...], forward_backward: Callable) -> Iterator[None]:
    """Says how many images at a time would have fitted where a batch does not fit into the memory."""
    try:
        yield
        return
    except torch.OutOfMemoryError as error:
        cause = str(error)
    # outside of the handler, whose traceback would keep the tensors alive
    raise torch.OutOfMemoryError(f"{cause}\n{what_fits(run, inputs, forward_backward)}")


def what_fits(run: Run, inputs: tuple[Tensor, ...], forward_backward: Callable) -> str:
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
            "result is the same within rounding (drop path draws other paths)"
        )
    return f"not even one image at a time fits into the memory of {run.device}"
