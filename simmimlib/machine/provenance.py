"""Where a result comes from: device, precision, library versions, commit, code."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from simmimlib.machine.statements import training_code


def provenance(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What every result says of its origin.

    ``code`` changes with the statements of the library that can move a number, ``commit`` with any commit.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{processor()}, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "precision": str(dtype).removeprefix("torch."),
        "versions": " ".join(f"{package} {version(package)}" for package in ("torch", "timm", "simmimlib")),
        "commit": commit(),
        "code": training_code(),
    }


def processor() -> str:
    """Model of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []  # not Linux
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(found, platform.processor() or platform.machine()) + " CPU"


def commit() -> str:
    """The commit, marked where the library differs from it (dvc.lock, which a running pipeline changes, may)."""
    folder = Path(__file__).parents[1]
    try:
        found, changes = (
            subprocess.run(["git", *command], capture_output=True, text=True, cwd=folder).stdout.strip()
            for command in (("rev-parse", "--short=10", "HEAD"), ("status", "--porcelain", "."))
        )
    except OSError:
        return "unknown"  # no git on this machine
    return found + "-dirty" * bool(changes) if found else "unknown"
