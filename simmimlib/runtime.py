"""What the training loops need from the machine: device, precision, provenance, progress, whole files."""

import json
import os
import platform
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

PRECISIONS = ("auto", "float32", "bfloat16")


def pick_device() -> torch.device:
    """A GPU if there is one, else the CPU; ``SIMMIM_DEVICE`` (for example ``cpu`` or ``cuda:1``) overrules."""
    if name := os.environ.get("SIMMIM_DEVICE"):
        return torch.device(name)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


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
    finally:
        temporary.unlink(missing_ok=True)


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


def interactive() -> bool:
    """True in a terminal or in a notebook opened by Jupyter (which names the notebook in JPY_SESSION_NAME)."""
    return sys.stderr.isatty() or "JPY_SESSION_NAME" in os.environ


class Progress:
    """Counts images through a run: a bar with rate and time left when interactive, one line an epoch in batch."""

    def __init__(self, title: str, epochs: int, images_per_epoch: int):
        self.title, self.epochs = title, epochs
        self.images = 0
        self.start = time.perf_counter()
        total = epochs * images_per_epoch
        self.bar = tqdm(total=total, desc=title, unit="img", disable=not interactive(), dynamic_ncols=True)

    def step(self, images: int) -> None:
        self.images += images
        self.bar.update(images)

    def epoch(self, row: dict) -> None:
        """Shows the numbers of a finished epoch (``row["epoch"]`` counts from 1)."""
        numbers = ", ".join(f"{k} {v:.4g}" for k, v in row.items() if k != "epoch" and isinstance(v, float))
        if not self.bar.disable:
            self.bar.set_postfix_str(numbers)
            return
        left = self.seconds / row["epoch"] * (self.epochs - row["epoch"])
        print(f"{self.title} epoch {row['epoch']}/{self.epochs}: {numbers}, {left:.0f} s left", flush=True)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def close(self) -> None:
        self.bar.close()
