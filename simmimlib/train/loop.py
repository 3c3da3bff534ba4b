"""The training loop (paper section 4.1): one for pre-training and fine-tuning. ``train_epoch`` shows the step.

Everything random in a step follows from the seed and the step's number (``data/streams.py``), so model, optimiser and
step number are all there is to save, and a run that was killed ends, on a CPU, in the very same numbers. The schedule
is a function of the step; there is no gradient scaler, because bfloat16 needs none. What happens when a loss is not
finite, memory runs out or a signal comes is in ``guards.py``; saving and resuming are in ``run.py`` and ``resume.py``.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from simmimlib.data.streams import STEPS, seed_globals
from simmimlib.machine.device import autocast
from simmimlib.machine.distributed import rank
from simmimlib.train.guards import check_losses, explain_out_of_memory
from simmimlib.train.run import NotFinite, Run


def train(run: Run, evaluate: Callable | None = None, on_epoch: Callable | None = None) -> list[dict]:
    """Trains to the end, or to a signal; ``log.csv`` grows with each epoch.

    Args:
        evaluate: called with the epoch's number, from 1, when it ends; what it returns joins the epoch's row.
        on_epoch: called with all rows so far.

    Returns:
        The rows: epoch, mean loss, mean norm of the gradient before clipping, last rate, steps left out so far.

    Raises:
        FloatingPointError: a loss or a gradient is not finite.
        torch.OutOfMemoryError: with what would fit.
        KeyboardInterrupt: SIGINT or SIGTERM came; everything is saved.
    """
    while len(run.rows) < run.settings.epochs:
        try:
            train_epoch(run)
        except NotFinite as error:
            if len(run.skipped) >= run.settings.skip_nonfinite:
                raise
            run.go_back(leaving_out=error)
            continue
        epoch = len(run.rows) + 1
        run.end_epoch(evaluate(epoch) if evaluate else {})
        if on_epoch:
            on_epoch(run.rows)
    run.write_log()
    return run.rows


def train_epoch(run: Run) -> None:
    """The steps that the current epoch still lacks."""
    first = len(run.rows) * len(run.batches)  # step with which the epoch starts
    run.model.train()
    for inputs in run.batches.epoch(len(run.rows), first=run.step - first):
        seed_globals(run.device, run.settings.seed, STEPS, run.step, rank())  # for drop path and mixup
        run.schedule.step_update(run.step)
        if run.step not in run.skipped:
            inputs = run.augment(*inputs) if run.augment else inputs
            with explain_out_of_memory(run, inputs, forward_backward):
                loss = forward_backward(run, inputs, run.parts)
            norm = clip_grad_norm_(run.model.parameters(), run.settings.clip_grad)
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.watch.note(run.step - first, loss, norm)
        run.step += 1
        run.progress.step(run.batches.batch_size)
        if run.watch.due(run.step - first, run.stop):
            stopping = check_losses(run, run.step - first)
            run.save(only_if_due=not stopping)
            if stopping:
                raise KeyboardInterrupt(
                    f"stopped by a signal after step {run.step}; saved: start the same run again to resume"
                )


def forward_backward(run: Run, inputs: tuple[Tensor, ...], parts: int) -> Tensor:
    """Adds the gradients of a batch, in so many parts; returns its loss (a scalar)."""
    total = torch.zeros((), device=run.device)
    chunks = list(zip(*(tensor.chunk(parts) for tensor in inputs), strict=True))
    for i, chunk in enumerate(chunks, 1):
        with run.no_sync() if i < len(chunks) else contextlib.nullcontext():
            with autocast(run.device, run.dtype):
                loss = run.objective(*chunk) * (len(chunk[0]) / len(inputs[0]))
            loss.backward()
        total += loss.detach()
    return total
