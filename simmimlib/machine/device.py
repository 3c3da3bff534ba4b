"""Device, precision and memory, found when a run starts: none of them is a setting of an experiment."""

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from simmimlib.settings import one_of, require

PRECISIONS = ("auto", "float32", "bfloat16")
COMPILE_STEPS = 2000  # on a GPU, runs of at least so many steps are compiled


def pick_device() -> torch.device:
    """A GPU if there is one, else the CPU; ``SIMMIM_DEVICE`` (for example ``cpu`` or ``cuda:1``) overrides it.

    Of several processes each gets the GPU of its local rank.
    """
    if name := os.environ.get("SIMMIM_DEVICE"):
        device = torch.device(name)
        if device.type != "cpu" and device.index is not None:
            torch.accelerator.set_device_index(device.index)  # whose generator is then seeded, too
        return device
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if dist.is_initialized() and device.type != "cpu":
        return own_gpu(device)
    return device


def own_gpu(device: torch.device) -> torch.device:
    """The GPU of this process's local rank; a cluster may show each process only its own one."""
    return torch.device(device.type, int(os.environ["LOCAL_RANK"]) % torch.accelerator.device_count())


def cores() -> int:
    """CPU cores for this process: those that it may use, at most its share among the processes of this machine."""
    all_cores = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else all_cores
    return max(1, min(allowed, all_cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """``"auto"`` is bfloat16 on a GPU that has it and float32 elsewhere."""
    if precision == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    return getattr(torch, precision)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def compiles(device: torch.device, steps: int) -> bool:
    """Whether a run of so many steps is compiled; ``SIMMIM_COMPILE`` (0 or 1) overrides it."""
    if wish := os.environ.get("SIMMIM_COMPILE"):
        one_of("SIMMIM_COMPILE", wish, ("0", "1"))
        return wish == "1"
    return device.type == "cuda" and steps >= COMPILE_STEPS


def micro_batch() -> float:
    """Images that go through the model at a time, at most: ``SIMMIM_MICRO_BATCH``; without it, all."""
    wish = os.environ.get("SIMMIM_MICRO_BATCH", "inf")
    require(wish == "inf" or (wish.isdecimal() and int(wish) > 0), "SIMMIM_MICRO_BATCH", wish, "a number above 0")
    return float(wish)


@contextlib.contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """With ``wanted``, only operations that give the same numbers each time, at some cost in speed on a GPU."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it; see torch's notes
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
