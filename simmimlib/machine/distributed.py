"""One device or many: how a loop is started on all GPUs of a machine, or of several.

How many devices there are is no setting of an experiment: it is found when a run starts, the batch size stays that of
all devices together, and of several processes the first one writes the files.

- One GPU, or none: the loop runs in this process.
- Several GPUs on this machine: one process for each, by torch's elastic launch; also from within a notebook.
- Several machines: start the same command in every process with ``torchrun`` or ``srun``, which say in the environment
  who is who; for a pipeline stage ``torchrun --nnodes=2 --nproc-per-node=8 ... -m simmimlib.pipeline.stages pretrain``.

``SIMMIM_PROCESSES`` overrides the number of processes on this machine (on CPUs they talk through gloo).
"""

import os
import subprocess
import uuid
from collections.abc import Callable

import torch
import torch.distributed as dist

from simmimlib.machine.device import cores, own_gpu, pick_device
from simmimlib.settings import Settings, require


def rank() -> int:
    """This process's number among those that train together; 0 when it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of the rows of a global batch; parts differ by one row at most."""
    return tensor.tensor_split(world_size())[rank()]


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def launch(loop: Callable, settings: Settings, on_epoch: Callable | None = None) -> dict:
    """Runs ``loop(settings, on_epoch)`` on every device and returns what it gives on the first.

    Args:
        loop: importable by name, since the processes are spawned.
        on_epoch: passed on where the loop runs in this process.
    """
    read_slurm()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return _in_group(loop, settings, on_epoch)
    count = process_count()
    if count == 1:
        return loop(settings, on_epoch)
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch  # imported here: most runs need none

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # seconds in which a stopped run may save
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,  # several runs may share a machine
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,  # a failed run resumes from its rolling checkpoint when it is started again
    )
    return elastic_launch(config, _in_group)(loop, settings)[0]


def process_count() -> int:
    """Processes to start on this machine: one for each GPU, unless ``SIMMIM_PROCESSES`` or ``SIMMIM_DEVICE`` is set."""
    if wish := os.environ.get("SIMMIM_PROCESSES"):
        require(wish.isdecimal() and int(wish) > 0, "SIMMIM_PROCESSES", wish, "a number above 0")
        return int(wish)
    if os.environ.get("SIMMIM_DEVICE") or pick_device().type == "cpu":
        return 1
    return torch.accelerator.device_count()


def _in_group(loop: Callable, settings: Settings, on_epoch: Callable | None = None) -> dict:
    """One of several processes: joins the others, runs, leaves."""
    device = pick_device()
    if device.type == "cpu":
        torch.set_num_threads(cores())
    else:
        device = own_gpu(device)
        torch.accelerator.set_device_index(device.index)
    # the backend that fits the device: NCCL for CUDA, gloo for CPUs
    dist.init_process_group(
        dist.get_default_backend_for_device(device), device_id=device if device.index is not None else None
    )
    try:
        return loop(settings, on_epoch)
    finally:
        dist.destroy_process_group()


def read_slurm() -> None:
    """Translates what ``srun`` says of a job with several tasks into what torch reads; torchrun's own words win."""
    env = os.environ
    if "RANK" in env or "SLURM_STEP_ID" not in env or int(env.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"]
    env["LOCAL_RANK"] = env["SLURM_LOCALID"]
    env["LOCAL_WORLD_SIZE"] = env["SLURM_STEP_TASKS_PER_NODE"].partition("(")[0].partition(",")[0]
    if "MASTER_ADDR" not in env:
        names = subprocess.run(
            ["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]], capture_output=True, text=True, check=True
        )
        env["MASTER_ADDR"] = names.stdout.split()[0]
    env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 20000))
