"""The rolling checkpoint of a run: what makes a killed run end as if nothing had happened.

It lies in ``.scratch/runs/<hash of everything the run depends on>/``, outside of what DVC and git look at, is written
about once a minute (less often where writing takes more than a hundredth of the time), and is deleted when the run has
finished. A file is written whole (temporary file, fsync, rename), carries its own checksum, and the one before it is
kept until it has been read back.
"""

import dataclasses
import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout

from simmimlib.data.packed import Packed
from simmimlib.machine.distributed import rank
from simmimlib.machine.files import project_root, read_json, write_json
from simmimlib.machine.statements import training_code
from simmimlib.train.settings import TrainSettings

MAGIC = b"simmimlib checkpoint 1\n"
LOCK_SECONDS = 3  # a process whose parent was killed may need a moment to notice and end
SAVE_SECONDS = 60.0  # it is written about so often,
SAVE_SHARE = 0.01  # but saving takes no more than this share of the time
KEEP_DAYS = 30  # that the checkpoint of an abandoned run is kept


class RollingCheckpoint:
    """The folder of one run.

    Args:
        identity: JSON-able values; the same ones find the same folder again.
        out: where the run writes its results; by it a later run tells which abandoned ones it takes the place of.
    """

    def __init__(self, identity: dict, out: str):
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        self.folder, self.out = project_root() / ".scratch" / "runs" / key, out
        self.saved_at, self.cost = time.monotonic(), 0.0

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held by one process at a time; the system frees it when that process dies.

        Raises:
            RuntimeError: another process trains with the same settings.
        """
        path = self.folder / "lock"
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(path, timeout=LOCK_SECONDS):
                write_json(self.folder / "run.json", {"out": self.out})
                yield
        except Timeout as error:
            raise RuntimeError(
                f"another process is training with exactly these settings (it holds {path}): wait for it, stop it, "
                "or give this run another `out` or `seed`"
            ) from error

    def orphans(self) -> Iterator[str]:
        """A line for each abandoned run of the same `out`, which had other settings, data or code.

        Old ones, whatever their `out`, are deleted; those that are under way are left alone.
        """
        for other in sorted(self.folder.parent.iterdir()):
            if other == self.folder:
                continue
            checkpoints = files(other)
            try:
                age = time.time() - (checkpoints or [other])[0].stat().st_mtime
                with FileLock(other / "lock", timeout=0):
                    if age > KEEP_DAYS * 86400:
                        shutil.rmtree(other, ignore_errors=True)
                        continue
            except (Timeout, FileNotFoundError):  # under way, or just finished
                continue
            if checkpoints and read_json(other / "run.json").get("out") == self.out:
                yield (
                    f"an unfinished run for {self.out} with other settings, data or code is not resumed; its "
                    f"checkpoint {checkpoints[0]} is kept for {KEEP_DAYS} days"
                )

    def files(self) -> list[Path]:
        """The checkpoints, newest first."""
        return files(self.folder)

    def due(self) -> bool:
        return time.monotonic() - self.saved_at >= max(SAVE_SECONDS, self.cost / SAVE_SHARE)

    def save(self, state: dict, writes: bool = True) -> None:
        """Writes ``state``, with ``state["step"]`` in its name, and proves it before an older one is deleted.

        Of several processes all call this, so that they agree on when it is due; the one that ``writes`` does.
        """
        start = time.monotonic()
        if writes:
            self._write(state)
        self.saved_at = time.monotonic()
        self.cost = self.saved_at - start

    def _write(self, state: dict) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getbuffer()
        self.folder.mkdir(parents=True, exist_ok=True)
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

    def load(self, device: torch.device | None = None) -> dict | None:
        """The newest state that can be read; None if there is none. What cannot be read is named and set aside.

        Of several processes all call this; the first one looks first, so that one of them sets aside.
        """
        if rank() > 0:
            dist.barrier()
        state = self._newest(device)
        if rank() == 0 and dist.is_initialized():
            dist.barrier()
        return state

    def _newest(self, device: torch.device | None) -> dict | None:
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


def identity(
    title: str, settings: TrainSettings, packed: Packed, starts_from: str, device: torch.device, dtype: torch.dtype
) -> dict:
    """Everything a run's numbers follow from: only the very same run resumes from a rolling checkpoint."""
    values = dataclasses.asdict(settings)
    del values["skip_nonfinite"]  # so that a run can resume with it
    start = hashlib.sha256(Path(starts_from).read_bytes()).hexdigest() if starts_from else ""
    code = {"code": training_code(), "torch": torch.__version__, "timm": timm.__version__}
    code |= {"device": device.type, "precision": str(dtype)}
    return {"loop": title, "settings": values, "data": packed.digest, "starts_from": start, **code}


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.ckpt"), reverse=True)


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
