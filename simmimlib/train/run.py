"""A run: its optimiser and schedule, how far it is, how it is saved, resumed and logged. ``loop.py`` trains it."""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simmimlib.data.batches import Batches
from simmimlib.data.packed import Packed
from simmimlib.machine.device import compiles, determinism, micro_batch, resolve_precision
from simmimlib.machine.distributed import rank, world_size
from simmimlib.machine.files import check_writable, write_csv
from simmimlib.machine.progress import Progress
from simmimlib.machine.provenance import provenance
from simmimlib.machine.signals import stop_signals
from simmimlib.settings import require
from simmimlib.train.losses import LossWatch
from simmimlib.train.optim import create_optimizer, create_schedule
from simmimlib.train.resume import RollingCheckpoint, identity
from simmimlib.train.settings import TrainSettings

RESULTS = ("metrics.json", "model.safetensors", "confusion.csv", "log.csv")  # what a run writes into `out`
LOG_COLUMNS = ["epoch", "loss", "grad_norm", "lr", "skipped"]


class NotFinite(FloatingPointError):
    """A loss or a gradient that is not finite, at ``step``."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class Objective(nn.Module):
    """The model with its loss, as one module: what is compiled and what DistributedDataParallel wraps."""

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor]):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.loss(self.model, *inputs)


class Run:
    """One run, from its first step or from where it was stopped. Use it as a context: leaving it without an error,
    after the results are written, deletes the rolling checkpoint.

    Args:
        title: shown in front of the progress.
        settings: of the loop.
        packed: the data set that ``batches`` come from.
        batches: a step's inputs, of this process.
        model: on its device; trained in place.
        groups: the optimiser's parameter groups.
        loss: (model, *inputs) -> scalar, the mean over the images of its inputs.
        augment: (*inputs) -> inputs, once a step, on the device (mixup, erasing).
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
        groups: list[dict[str, Any]],
        loss: Callable[..., Tensor],
        augment: Callable[..., tuple] | None = None,
        starts_from: str = "",
    ):
        ranks, size = world_size(), batches.batch_size
        require(size % ranks == 0, "batch_size", size, f"a multiple of {ranks} processes (SIMMIM_PROCESSES)")
        self.title, self.settings, self.batches, self.model = title, settings, batches, model
        self.device, self.augment = batches.device, augment
        self.dtype = resolve_precision(settings.precision, self.device)
        self.optimizer = create_optimizer(groups, settings.beta2)
        self.schedule = create_schedule(self.optimizer, settings, len(batches))
        self.objective: Any = Objective(model, loss)
        self.no_sync: Callable = contextlib.nullcontext
        if ranks > 1:
            self.objective = DistributedDataParallel(
                self.objective, broadcast_buffers=False, gradient_as_bucket_view=True
            )
            self.no_sync = self.objective.no_sync
        if compiles(self.device, settings.epochs * len(batches)):
            # a run keeps its shapes; other runs of this process must not turn them into dynamic ones
            self.objective = torch.compile(self.objective, dynamic=False)
        self.parts = max(1, math.ceil(size / ranks / micro_batch()))  # that a batch goes through the model in
        self.rolling = RollingCheckpoint(
            identity(title, settings, packed, starts_from, self.device, self.dtype), settings.out
        )
        self.watch = LossWatch(len(batches), self.device)
        self.step = 0
        self.rows: list[dict] = []
        self.skipped: list[int] = []

    @property
    def rate(self) -> float:
        """The learning rate of the topmost layer."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def metrics(self) -> dict:
        """What every finished run reports about itself."""
        images, seconds = self.progress.images, self.progress.seconds
        return {
            "images_seen": images,
            "images_per_second": images / seconds if images else None,
            "wall_seconds": seconds,
            "skipped_steps": len(self.skipped),
            "seed": self.settings.seed,
            **provenance(self.device, self.dtype),
        }

    def __enter__(self) -> Self:
        check_writable(self.settings.out)
        settings, count = self.settings, len(self.batches)
        with contextlib.ExitStack() as stack:
            if rank() == 0:
                stack.enter_context(self.rolling.lock())
            stack.enter_context(determinism(settings.deterministic))
            self.stop = stack.enter_context(stop_signals())
            saved = self.rolling.load(self.device)
            if world_size() > 1:
                dist.barrier()  # all have looked before one writes
            reached = (saved["images"], saved["seconds"]) if saved else (0, 0.0)
            images = count * self.batches.batch_size  # an epoch
            self.progress = Progress(
                self.title,
                settings.epochs,
                images,
                *reached,
                quiet=rank() > 0,  # type: ignore[misc]
            )
            stack.callback(self.progress.close)
            if saved:
                self.restore(saved)
                self.progress.say(f"resuming after step {self.step} of {settings.epochs * count}")
            elif rank() == 0:
                for orphan in self.rolling.orphans():
                    self.progress.say(orphan)
                for name in RESULTS:  # of an earlier run: they must not be taken for this one's
                    (Path(settings.out) / name).unlink(missing_ok=True)
                self.save()
            self.open = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        with self.open:
            if kind is None and rank() == 0:
                self.rolling.remove()

    def end_epoch(self, evaluated: dict) -> None:
        """Logs the epoch whose steps are done, with what was evaluated after it."""
        first = len(self.rows) * len(self.batches)
        means = self.watch.means([step - first for step in self.skipped])
        row = {"epoch": len(self.rows) + 1, **means, "lr": self.rate, "skipped": len(self.skipped)}
        self.rows.append(row | evaluated)
        self.watch.checked = 0
        self.write_log()
        self.progress.epoch(self.rows[-1])
        self.save(only_if_due=True)

    def go_back(self, leaving_out: NotFinite) -> None:
        """To the last checkpoint, to leave out the batch whose loss was not finite."""
        skipped = [*self.skipped, leaving_out.step]
        saved = self.rolling.load(self.device)
        if saved is None:
            raise leaving_out  # somebody deleted it
        self.restore(saved)
        self.skipped = skipped
        self.progress.say(f"{leaving_out}. Going back to step {self.step}, to leave that batch out")

    def save(self, only_if_due: bool = False) -> None:
        """Everything a later process needs; only ever called where all losses so far are finite."""
        if only_if_due and not self.rolling.due():
            return
        state = {"step": self.step, "rows": self.rows, "skipped": self.skipped, "watch": self.watch.state()}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        self.rolling.save(state | {"images": self.progress.images, "seconds": self.progress.seconds}, rank() == 0)

    def restore(self, saved: dict) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.watch.restore(saved["watch"])
        self.step, self.rows, self.skipped = saved["step"], saved["rows"], saved["skipped"]
        self.progress.images = self.progress.bar.n = saved["images"]

    def write_log(self) -> None:
        if rank() == 0:
            write_csv(Path(self.settings.out) / "log.csv", self.rows, None if self.rows else LOG_COLUMNS)
