"""What pre-training and fine-tuning share: their settings, the step, and that nothing is lost when a run dies.

Everything random in a step follows from the seed and the step's number (``batches.py`` for the data; the global
generators, which drop path and mixup use, are seeded anew before each step). So model, optimiser and step number are
all there is to save, and a run that was killed ends, on a CPU, in the very same numbers. The schedule is a function of
the step; there is no gradient scaler, because bfloat16 needs none.
"""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from timm.utils import random_seed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simmimlib.batches import SOURCES, Batches
from simmimlib.data import Packed
from simmimlib.optim import SCHEDULES, create_optimizer, create_schedule
from simmimlib.runtime import (
    PRECISIONS,
    Progress,
    autocast,
    check_writable,
    compiles,
    determinism,
    micro_batch,
    provenance,
    rank,
    stop_signals,
    sum_over_ranks,
    world_size,
    write_csv,
)
from simmimlib.scratch import Scratch, identity
from simmimlib.settings import Settings, one_of, require

CHECK_STEPS = 20  # losses are fetched from the device, and looked at, every so many steps
SAVE_SECONDS = 60.0  # the rolling checkpoint is written about so often,
SAVE_SHARE = 0.01  # but saving takes no more than this share of the time
RESULTS = ("metrics.json", "model.safetensors", "confusion.csv", "log.csv")  # what a run writes into `out`
LOG_COLUMNS = ["epoch", "loss", "grad_norm", "lr", "skipped"]
STATE = ("step", "rows", "skipped", "losses", "norms", "checked")  # beside model and optimiser


@dataclass
class TrainSettings(Settings):
    """The settings that both loops have."""

    data: str = "mnist5k"
    encoder: str = "vit_tiny_patch16_224"
    encoder_kwargs: dict = field(default_factory=lambda: {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4})
    image_size: int = 32
    epochs: int = 12
    batch_size: int = 32
    base_lr: float = 1.0e-3
    base_warmup_lr: float = 1.0e-4
    base_min_lr: float = 1.0e-4
    warmup_epochs: float = 1.0
    schedule: str = "cosine"
    step_epoch: int = 0
    weight_decay: float = 0.05
    drop_path: float = 0.0
    clip_norm: float = 5.0
    crop_scale: float = 1.0
    flip: bool = False
    source: str = "packed"
    precision: str = "auto"
    deterministic: bool = False
    skip_nonfinite: int = 0
    seed: int = 0
    out: str = ""

    def check(self):
        one_of("schedule", self.schedule, SCHEDULES)
        one_of("precision", self.precision, PRECISIONS)
        one_of("source", self.source, SOURCES)
        require(0 < self.crop_scale <= 1, "crop_scale", self.crop_scale, "above 0 and at most 1")
        require(0 <= self.drop_path < 1, "drop_path", self.drop_path, "from 0 to below 1")
        for name in ("clip_norm", "batch_size"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in ("base_lr", "base_warmup_lr", "base_min_lr", "warmup_epochs", "weight_decay", "epochs", "seed"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(self.skip_nonfinite >= 0, "skip_nonfinite", self.skip_nonfinite, "0 (stop) or more")


class Objective(nn.Module):
    """The model with its loss, as one module: what is compiled and what DistributedDataParallel wraps."""

    def __init__(self, model: nn.Module, loss: Callable):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.loss(self.model, *inputs)


class NotFinite(FloatingPointError):
    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class Training:
    """One run, from its first step or from where it was stopped. Use it as a context: leaving it without an error,
    after the results are written, deletes the rolling checkpoint.

    Args:
        title: shown in front of the progress.
        settings: of the loop.
        packed: the data set that ``batches`` come from.
        batches: a step's inputs, of this process.
        model: on its device; trained in place.
        groups: the optimiser's parameter groups.
        dtype: of autocast.
        loss: (model, *inputs) -> scalar, the mean over the images of its inputs.
        prepare: (*inputs) -> inputs, once a step, on the device (mixup, erasing).
        starts_from: a file that the run starts from, "" for none; another file is another run.

    Raises:
        ValueError: a batch that the processes cannot share equally.
        RuntimeError: another process trains with these settings.
        OSError: results cannot be written.
    """

    def __init__(
        self,
        title: str,
        settings: TrainSettings,
        packed: Packed,
        batches: Batches,
        model: nn.Module,
        groups: list,
        dtype: torch.dtype,
        loss: Callable,
        prepare: Callable | None = None,
        starts_from: str = "",
    ):
        ranks = world_size()
        require(batches.batch_size % ranks == 0, "batch_size", batches.batch_size, f"a multiple of {ranks} processes")
        self.title, self.settings, self.batches, self.model, self.dtype = title, settings, batches, model, dtype
        self.device, self.prepare = batches.device, prepare
        self.optimizer = create_optimizer(groups)
        self.schedule = create_schedule(self.optimizer, settings, len(batches))
        self.objective = Objective(model, loss)
        self.no_sync = contextlib.nullcontext
        if ranks > 1:
            self.objective = DistributedDataParallel(
                self.objective, broadcast_buffers=False, gradient_as_bucket_view=True
            )
            self.no_sync = self.objective.no_sync
        if compiles(self.device, settings.epochs * len(batches)):
            self.objective = torch.compile(self.objective)
        self.accumulate = max(1, math.ceil(batches.batch_size / ranks / micro_batch()))
        self.scratch = Scratch(identity(title, settings, packed, starts_from))
        self.step, self.rows, self.skipped = 0, [], []
        # of the current epoch's steps, on the device: no step waits for its loss
        self.losses, self.norms = torch.zeros(2, max(1, len(batches)), device=self.device)
        self.checked = 0  # steps of the epoch whose losses were looked at
        self.saved_at, self.save_cost = time.monotonic(), 0.0

    def __enter__(self):
        check_writable(self.settings.out)
        with contextlib.ExitStack() as stack:
            if rank() == 0:
                stack.enter_context(self.scratch.lock())
            stack.enter_context(determinism(self.settings.deterministic))
            self.stop = stack.enter_context(stop_signals())
            saved = self.scratch.load(self.device)
            if world_size() > 1:
                dist.barrier()  # all have looked before one writes
            images, seconds = (saved["images"], saved["seconds"]) if saved else (0, 0.0)
            self.progress = Progress(
                self.title, self.settings.epochs, len(self.batches) * self.batches.batch_size, images, seconds
            )
            stack.callback(self.progress.close)
            if saved:
                self._restore(saved)
                self._say(f"going on after step {self.step} of {self.settings.epochs * len(self.batches)}")
            elif rank() == 0:
                for name in RESULTS:  # of an earlier run: they must not be taken for this one's
                    (Path(self.settings.out) / name).unlink(missing_ok=True)
                self._save()
            self.open = stack.pop_all()
        return self

    def __exit__(self, kind, error, traceback):
        with self.open:
            if kind is None and rank() == 0:
                self.scratch.remove()

    def run(self, evaluate: Callable | None = None, on_epoch: Callable | None = None) -> list[dict]:
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
        while len(self.rows) < self.settings.epochs:
            try:
                self._steps_of_epoch()
            except NotFinite as error:
                if len(self.skipped) >= self.settings.skip_nonfinite:
                    raise
                skipped = [*self.skipped, error.step]
                self._restore(self.scratch.load(self.device))
                self.skipped = skipped
                self._say(f"{error}. Going back to step {self.step}, to leave that batch out")
                continue
            row = self._row() | (evaluate(len(self.rows) + 1) if evaluate else {})
            self.rows.append(row)
            self.checked = 0
            self._write_log()
            self.progress.epoch(row)
            self._save_if_due()
            if on_epoch:
                on_epoch(self.rows)
        self._write_log()
        return self.rows

    def metrics(self) -> dict:
        """What every finished run reports about itself."""
        progress = self.progress
        return {
            "images_seen": progress.images,
            "images_per_second": progress.images / progress.seconds if progress.images else None,
            "wall_seconds": progress.seconds,
            "skipped_steps": len(self.skipped),
            "seed": self.settings.seed,
            **provenance(self.device, self.dtype),
        }

    # One epoch, one step -------------------------------------------------------------------------------------------

    def _steps_of_epoch(self) -> None:
        """The steps that the current epoch still lacks."""
        epoch, length = len(self.rows), len(self.batches)
        self.model.train()
        for inputs in self.batches.epoch(epoch, first=self.step - epoch * length):
            self._step(inputs, self.step - epoch * length)
            done = self.step - epoch * length
            # processes have to agree on when to look; one alone can stop at once
            if done % CHECK_STEPS == 0 or done == length or (self.stop and world_size() == 1):
                stopping = self._check(epoch, done)
                if stopping:
                    self._save()
                    raise KeyboardInterrupt(
                        f"stopped by a signal after step {self.step}; saved: start the same run again to go on"
                    )
                self._save_if_due()

    def _step(self, inputs: tuple, i: int) -> None:
        """One optimiser step on this process's part of the global batch; ``i`` counts the steps of the epoch."""
        random_seed(int(np.random.SeedSequence([self.settings.seed, self.step]).generate_state(1)[0] >> 1), rank())
        self.schedule.step_update(self.step)
        if self.step in self.skipped:
            self.losses[i] = self.norms[i] = math.nan
        else:
            if self.prepare:
                inputs = self.prepare(*inputs)
            try:
                self.losses[i], self.norms[i] = self._update(inputs)
            except torch.OutOfMemoryError as error:
                cause = str(error)
            else:
                cause = None
            if cause:  # outside of the handler, whose traceback would keep the tensors alive
                raise torch.OutOfMemoryError(f"{cause}\n{self._what_fits(inputs)}")
        self.step += 1
        self.progress.step(self.batches.batch_size)

    def _update(self, inputs: tuple) -> tuple[Tensor, Tensor]:
        """Gradients in ``accumulate`` parts, then the step. Returns the loss and the norm of the gradient."""
        total = torch.zeros((), device=self.device)
        parts = list(zip(*(tensor.chunk(self.accumulate) for tensor in inputs), strict=True))
        for part in parts:
            with contextlib.nullcontext() if part is parts[-1] else self.no_sync():
                loss = self._loss(part) * (len(part[0]) / len(inputs[0]))
                loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, norm

    def _loss(self, inputs: tuple) -> Tensor:
        with autocast(self.device, self.dtype):
            return self.objective(*inputs)

    def _row(self) -> dict:
        """The log's row of the epoch whose steps are done."""
        count = len(self.batches)
        losses, norms = self.losses[:count].tolist(), self.norms[:count].tolist()
        first = len(self.rows) * count
        kept = [i for i in range(count) if first + i not in self.skipped]
        return {
            "epoch": len(self.rows) + 1,
            "loss": sum(losses[i] for i in kept) / len(kept) if kept else math.nan,
            "grad_norm": sum(norms[i] for i in kept) / len(kept) if kept else math.nan,
            "lr": max(group["lr"] for group in self.optimizer.param_groups),
            "skipped": len(self.skipped),
        }

    # Guards --------------------------------------------------------------------------------------------------------

    def _check(self, epoch: int, done: int) -> bool:
        """Fetches the losses since the last check, of all processes; raises NotFinite. True if a signal came."""
        start, first = self.checked, epoch * len(self.batches)
        news = torch.zeros(done - start + 1, device=self.device)
        news[:-1], news[-1] = self.losses[start:done], float(bool(self.stop))
        news = sum_over_ranks(news) / world_size()
        self.losses[start:done] = news[:-1]
        values = torch.stack([news[:-1], self.norms[start:done]]).tolist()
        for i, (loss, norm) in enumerate(zip(*values, strict=True), start):
            if not (math.isfinite(loss) and math.isfinite(norm)) and first + i not in self.skipped:
                raise NotFinite(self._what_happened(epoch, i, loss, norm), first + i)
        self.checked = done
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        self.progress.show(loss=values[0][-1] if values[0] else math.nan, lr=lr)
        return news[-1].item() > 0

    def _what_happened(self, epoch: int, i: int, loss: float, norm: float) -> str:
        count = len(self.batches)
        step = epoch * count + i
        self.schedule.step_update(step)
        rate = max(group["lr"] for group in self.optimizer.param_groups)
        rows = self.batches.rows(epoch)[i].tolist()
        some = ", ".join(map(str, rows[:8])) + ", ..." * (len(rows) > 8)
        return (
            f"the loss is {loss} and the norm of the gradient {norm} at step {step} (epoch {epoch + 1}, batch {i + 1} "
            f"of {count}, learning rate {rate:.3g}, rows {some} of the training images). The last good checkpoint is "
            f"{self.scratch.files()[0]}: start the run again with skip_nonfinite = {len(self.skipped) + 1} to go on "
            "from it without that batch, or with a lower base_lr or clip_norm to start anew"
        )

    def _what_fits(self, inputs: tuple) -> str:
        """Tries smaller parts of the batch that did not fit into memory."""
        count = len(inputs[0])
        part = math.ceil(count / self.accumulate)
        while part > 1:
            part = math.ceil(part / 2)
            self.optimizer.zero_grad()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            try:
                with self.no_sync():
                    self._loss(tuple(tensor[:part] for tensor in inputs)).backward()
            except torch.OutOfMemoryError:
                continue
            return (
                f"{count} images a step on {self.device} do not fit; {part} at a time do: set the environment variable "
                f"SIMMIM_MICRO_BATCH={part}. Gradients are then summed over {math.ceil(count / part)} parts and the "
                "result is the same within rounding"
            )
        return f"not even one image at a time fits into the memory of {self.device}"

    # The rolling checkpoint ------------------------------------------------------------------------------------------

    def _save_if_due(self) -> None:
        if time.monotonic() - self.saved_at >= max(SAVE_SECONDS, self.save_cost / SAVE_SHARE):
            self._save()

    def _save(self) -> None:
        """Everything a later process needs; only ever called where all losses so far are finite."""
        start = time.monotonic()
        if rank() == 0:
            self.scratch.save(
                {
                    "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    **{name: getattr(self, name) for name in STATE},
                    "images": self.progress.images,
                    "seconds": self.progress.seconds,
                }
            )
        self.saved_at = time.monotonic()
        self.save_cost = self.saved_at - start

    def _restore(self, saved: dict) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        for name in STATE:
            setattr(self, name, saved[name])
        self.progress.images = saved["images"]

    def _write_log(self) -> None:
        if rank() == 0:
            write_csv(Path(self.settings.out) / "log.csv", self.rows, None if self.rows else LOG_COLUMNS)

    def _say(self, message: str) -> None:
        if rank() == 0:
            print(f"{self.title}: {message}", flush=True)
