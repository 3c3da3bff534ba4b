"""What the training loops need from the machine: device, precision, provenance, progress, whole files."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
import torch.distributed as dist
from tqdm import tqdm

from simmimlib.settings import one_of, require

PRECISIONS = ("auto", "float32", "bfloat16")
COMPILE_STEPS = 2000  # on a GPU, runs of at least so many steps are compiled


def pick_device() -> torch.device:
    """A GPU if there is one, else the CPU; ``SIMMIM_DEVICE`` (for example ``cpu`` or ``cuda:1``) overrules.

    Of several processes each gets the GPU of its local rank.
    """
    if name := os.environ.get("SIMMIM_DEVICE"):
        return torch.device(name)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if dist.is_initialized() and device.type != "cpu":
        return torch.device(device.type, int(os.environ["LOCAL_RANK"]))
    return device


def rank() -> int:
    """This process's number among those that train together; 0 when it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def share(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of the rows of a global batch; parts differ by one row at most."""
    return tensor.tensor_split(world_size())[rank()]


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """``"auto"`` is bfloat16 on a GPU that has it and float32 elsewhere."""
    if precision == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return getattr(torch, precision)


def autocast(device: torch.device, dtype: torch.dtype):
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


@contextmanager
def whole_file(path):
    """Yields a temporary path beside ``path`` that takes its place only if the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        raise OSError(f"{path}: could not be written ({error}); {free / 1e9:.1f} GB are free there") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(folder) -> None:
    """Raises OSError now rather than after hours of training, if results could not be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"out = {str(folder)!r}: must be a folder that can be written to ({error})") from error


def write_json(path, values: dict) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")


def write_csv(path, rows, columns=None) -> None:
    with whole_file(path) as temporary:
        pd.DataFrame(rows, columns=columns).to_csv(temporary, index=False)


def provenance(device: torch.device, dtype: torch.dtype) -> dict:
    """Where a result comes from: device, precision, library versions and commit."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "precision": str(dtype).removeprefix("torch."),
        "versions": " ".join(f"{package} {version(package)}" for package in ("torch", "timm", "simmimlib")),
        "commit": _commit(),
    }


def _commit() -> str:
    """The commit, marked where the library differs from it (dvc.lock, which a running pipeline changes, may)."""
    folder = Path(__file__).parent
    try:
        commit, changes = (
            subprocess.run(["git", *command], capture_output=True, text=True, cwd=folder).stdout.strip()
            for command in (("rev-parse", "--short=10", "HEAD"), ("status", "--porcelain", "."))
        )
    except OSError:
        return "unknown"  # no git on this machine
    return commit + "-dirty" * bool(changes) if commit else "unknown"


def compiles(device: torch.device, steps: int) -> bool:
    """Whether a run of so many steps is compiled; ``SIMMIM_COMPILE`` (0 or 1) overrules."""
    if wish := os.environ.get("SIMMIM_COMPILE"):
        one_of("SIMMIM_COMPILE", wish, ("0", "1"))
        return wish == "1"
    return device.type == "cuda" and steps >= COMPILE_STEPS


def micro_batch() -> float:
    """Images that go through the model at a time, at most: ``SIMMIM_MICRO_BATCH``; without it, all."""
    wish = os.environ.get("SIMMIM_MICRO_BATCH", "inf")
    require(wish == "inf" or (wish.isdecimal() and int(wish) > 0), "SIMMIM_MICRO_BATCH", wish, "a number above 0")
    return float(wish)


@contextmanager
def determinism(wanted: bool):
    """With ``wanted``, only operations that give the same numbers each time, at some cost in speed on a GPU."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it; see torch's notes
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def stop_signals():
    """Yields a list that a first SIGINT or SIGTERM puts its name into; a second one interrupts at once."""
    caught = []

    def note(number, frame):
        if caught:
            raise KeyboardInterrupt("stopped by a second signal, without saving")
        caught.append(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield caught  # signals reach the main thread only
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interactive() -> bool:
    """True in a terminal or in a notebook opened by Jupyter (which names the notebook in JPY_SESSION_NAME)."""
    return sys.stderr.isatty() or "JPY_SESSION_NAME" in os.environ


class Progress:
    """Counts images through a run: a bar with rate and time left when interactive, one line an epoch in batch.

    ``images`` and ``seconds`` go on from what an interrupted run had reached.
    """

    def __init__(self, title: str, epochs: int, images_per_epoch: int, images=0, seconds=0.0):
        self.title, self.epochs = title, epochs
        self.images = images
        self.start = time.perf_counter() - seconds
        total, hidden = epochs * images_per_epoch, rank() > 0 or not interactive()
        self.bar = tqdm(total=total, initial=images, desc=title, unit="img", disable=hidden, dynamic_ncols=True)

    def step(self, images: int) -> None:
        self.images += images
        self.bar.update(images)

    def show(self, **numbers: float) -> None:
        """Puts the latest numbers behind the bar."""
        self.bar.set_postfix_str(_numbers(numbers), refresh=False)

    def epoch(self, row: dict) -> None:
        """Prints the numbers of a finished epoch (``row["epoch"]`` counts from 1) where there is no bar."""
        self.show(**row)
        if rank() == 0 and self.bar.disable:
            left = self.seconds / row["epoch"] * (self.epochs - row["epoch"])
            numbers = f"{_numbers(row)}, {self.images / self.seconds:.4g} img/s, {left:.0f} s left"
            print(f"{self.title} epoch {row['epoch']}/{self.epochs}: {numbers}", flush=True)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def close(self) -> None:
        self.bar.close()


def _numbers(row: dict) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in row.items() if isinstance(value, float))
