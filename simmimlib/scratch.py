"""The rolling checkpoint of a run: what makes a killed run go on as if nothing had happened.

It lies in ``.scratch/runs/<hash of everything the run depends on>/``, outside of what DVC and git look at, and is
deleted when the run has finished. A file is written whole (temporary file, fsync, rename), carries its own checksum,
and the one before it is kept until it has been read back.
"""

import dataclasses
import hashlib
import io
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

from simmimlib.data import Packed
from simmimlib.settings import Settings, project_root

MAGIC = b"simmimlib checkpoint 1\n"
LOCK_SECONDS = 3  # a process whose parent was killed may need a moment to notice and end


class Scratch:
    """The folder of one run.

    Args:
        identity: JSON-able values; the same ones find the same folder again.
    """

    def __init__(self, identity: dict):
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = project_root() / ".scratch" / "runs" / key
        self.folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def lock(self):
        """Held by one process at a time; the system frees it when that process dies.

        Raises:
            RuntimeError: another process trains with the same settings.
        """
        path = self.folder / "lock"
        try:
            with FileLock(path, timeout=LOCK_SECONDS):
                yield
        except Timeout as error:
            raise RuntimeError(
                f"another process is training with exactly these settings (it holds {path}): wait for it, stop it, "
                "or give this run another `out` or `seed`"
            ) from error

    def files(self) -> list[Path]:
        """The checkpoints, newest first."""
        return sorted(self.folder.glob("step-*.ckpt"), reverse=True)

    def save(self, state: dict) -> Path:
        """Writes ``state``, with ``state["step"]`` in its name, and proves it before an older one is deleted."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getbuffer()
        path = self.folder / f"step-{state['step']:010d}.ckpt"
        partial = path.with_suffix(".partial")
        try:
            with partial.open("wb") as file:
                file.write(MAGIC + hashlib.sha256(content).digest())
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            size, free = len(content) / 1e9, shutil.disk_usage(self.folder).free / 1e9
            raise OSError(
                f"{path}: the checkpoint of {size:.3f} GB could not be written ({error}); {free:.3f} GB are free there"
            ) from error
        read(path)
        for old in self.files()[2:]:
            old.unlink()
        return path

    def load(self, device=None) -> dict | None:
        """The newest state that can be read; None if there is none. What cannot be read is named and set aside."""
        for path in self.files():
            try:
                return torch.load(io.BytesIO(read(path)), map_location=device, weights_only=True)
            except ValueError as error:
                aside = path.with_suffix(".unreadable")
                path.replace(aside)
                print(f"{error}; set aside as {aside.name}, going back to the checkpoint before it", flush=True)
        return None

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def identity(title: str, settings: Settings, packed: Packed, starts_from: str) -> dict:
    """Everything a run's numbers follow from: only the very same run goes on from a rolling checkpoint."""
    values = dataclasses.asdict(settings)
    del values["skip_nonfinite"]  # so that a run can go on with it
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    if starts_from:
        digest.update(Path(starts_from).read_bytes())
    labels, images = packed.train.labels, packed.train.images
    digest.update(np.ascontiguousarray(labels))
    for i in np.linspace(0, len(images) - 1, 16).astype(int):
        digest.update(np.ascontiguousarray(images[i]))
    return {"loop": title, "settings": values, "torch": torch.__version__, "digest": digest.hexdigest()}


def read(path: Path) -> bytes:
    """The checked content of a checkpoint file.

    Raises:
        ValueError: a truncated, damaged or foreign file.
    """
    content = path.read_bytes()
    start = len(MAGIC) + 32
    if not content.startswith(MAGIC):
        raise ValueError(f"{path} is not a checkpoint of simmimlib's training")
    if hashlib.sha256(content[start:]).digest() != content[len(MAGIC) : start]:
        raise ValueError(f"{path} is damaged or cut off: its checksum does not fit")
    return content[start:]
