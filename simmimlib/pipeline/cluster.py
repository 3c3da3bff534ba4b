"""The runs of the active profile as jobs, by submitit: one array job on Slurm, its local executor where there is none.

    python -m simmimlib.pipeline.campaign submit --minutes 240                 # a GPU for each run
    python -m simmimlib.pipeline.campaign submit --gpus-per-node 8 --jobs 4    # four runs at a time, on eight GPUs each
    python -m simmimlib.pipeline.campaign submit --gpus-per-node 8 --nodes 2   # every run on two machines
    python -m simmimlib.pipeline.campaign submit --cluster local               # here, one run after the other

The project's folder is on a file system that all nodes share. On one node a run starts a process for each GPU by
torch's launcher, on several Slurm starts them (``machine/distributed.py``). Each job records its run in ``runs.csv``
when it has finished; what is recorded there is not submitted again. How a job ends:

- Its time is nearly over (or ``scancel --signal=USR2``): the training saves, and submitit queues the job again.
- It is preempted, or ``scontrol requeue``: Slurm sends SIGTERM, at which the training saves, and queues the job again.
- It failed or was cancelled: the next ``submit`` hands it over again.

A job that is queued again resumes in the stage and at the step where it stopped.
"""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

from simmimlib.pipeline.profiles import read_params
from simmimlib.pipeline.running import Running, by_key, claim, record
from simmimlib.settings import require

try:
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError
    from submitit.helpers import DelayedSubmission
except ModuleNotFoundError as error:
    raise ImportError("`submit` hands runs to a cluster by submitit, which is missing: pip install submitit") from error

REQUEUES = 100  # times that a job whose time was over is queued again
NO_LIMIT = 365 * 24 * 60  # minutes of a job on this machine, where nobody else waits for it


class RunJob:
    """One run, as submitit pickles it and calls it in each task of a job.

    Args:
        key: of the run in the profile.
        wanted: what it is given (its element of ``pipeline.arms.wanted_runs``).
    """

    def __init__(self, key: str, wanted: dict):
        self.key, self.wanted = key, wanted
        self.running: Running | None = None

    def __call__(self) -> None:
        """
        Raises:
            ValueError: another profile is active than the one that was submitted.
            RuntimeError: a stage failed; the end of what it said.
        """
        terminated: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, frame: terminated.append(number))
        interrupted: list[int] = []  # Ctrl-C reaches the jobs of the local executor, which repeats it at once
        signal.signal(signal.SIGINT, lambda number, frame: interrupted.append(number))
        params, task = read_params(), submitit.JobEnvironment()
        if by_key(params).get(self.key) != self.wanted:
            raise ValueError(f"{self.key}: params.yaml holds other values than when this job was submitted")
        self.running = claim(self.key, params, self.wanted, task.global_rank)
        if self.running:
            while not interrupted and not self.running.ended():
                time.sleep(0.2)
            if interrupted:
                self.checkpoint()
                raise KeyboardInterrupt
            if self.running.process.returncode:
                while terminated and task.cluster == "slurm":
                    time.sleep(1)  # Slurm ends it within its grace time; had it ended before, it would not be requeued
                raise RuntimeError(f"{self.key} failed:\n{self.running.log.read_text()[-2000:]}")
        if task.global_rank == 0:
            record(params)

    def checkpoint(self) -> DelayedSubmission:
        """Called by submitit when the time is nearly over: saves, and returns what the requeued job calls."""
        if self.running:
            self.running.stop()
            self.running.finish()
        return DelayedSubmission(RunJob(self.key, self.wanted))


def submit(
    params: dict,
    cluster: str | None,
    nodes: int,
    gpus_per_node: int,
    cpus_per_task: int | None,
    minutes: float,
    jobs: int | None,
) -> None:
    """Hands over every run that is not recorded yet; returns when they are queued, without Slurm when they have ended.

    Args:
        cluster: ``slurm`` or ``local``; None takes what there is.
        minutes: that Slurm gives a job at a time.
        jobs: runs at a time; None leaves it to Slurm, and is one on this machine.

    Raises:
        ValueError: there is no Slurm, or it refuses.
    """
    require(cluster != "slurm" or shutil.which("srun"), "--cluster", cluster, "local here: there is no `srun`")
    slurm = (cluster or submitit.AutoExecutor.which()) == "slurm"
    require(slurm or nodes == 1, "--nodes", nodes, "1 where there is no Slurm")
    require(minutes >= 5, "--minutes", minutes, "at least 5: saving and starting take two of them")
    done = set(record(params).get("key", []))
    todo = [RunJob(key, wanted) for key, wanted in by_key(params).items() if key not in done]
    print(f"{len(done)} runs are recorded, {len(todo)} are to do", flush=True)
    if not todo:
        return
    folder = Path(".scratch/jobs", f"{params['profile']}-{time.strftime('%Y%m%d-%H%M%S')}")
    executor = submitit.AutoExecutor(folder, cluster, slurm_max_num_timeout=REQUEUES)
    executor.update_parameters(
        name=f"simmim-{params['profile']}",
        nodes=nodes,
        tasks_per_node=max(1, gpus_per_node) if nodes > 1 else 1,
        gpus_per_node=gpus_per_node or None,
        cpus_per_task=cpus_per_task,
        slurm_timeout_min=int(minutes),
        local_timeout_min=NO_LIMIT,
        slurm_array_parallelism=jobs,
        # srun does not take it over from sbatch
        slurm_srun_args=[f"--cpus-per-task={cpus_per_task}"] if cpus_per_task else None,
    )
    if not slurm:
        run_here(executor, todo, jobs or 1, gpus_per_node)
        done = set(record(params).get("key", []))
        if failed := [one.key for one in todo if one.key not in done]:
            sys.exit(f"failed: {', '.join(failed)}; logs are in {folder} and .scratch")
        return
    try:
        queued = executor.submit_array(todo)
    except (FailedJobError, FailedSubmissionError) as error:
        shutil.rmtree(folder)
        raise ValueError(f"Slurm refused the jobs, nothing is queued: {error}") from error
    for job, one in zip(queued, todo, strict=True):
        print(job.job_id, one.key)
    print(f"queued: `squeue --me` shows them, `scancel` stops them; logs are in {folder} and .scratch")


def run_here(executor: submitit.AutoExecutor, todo: list[RunJob], jobs: int, gpus_per_run: int) -> None:
    """The local executor starts at once what it gets, on the first GPUs: so it gets a few at a time, and their GPUs.

    Raises:
        ValueError: there are fewer GPUs than the runs at a time would take.
    """
    gpus = visible_gpus() if gpus_per_run else []
    allowed = f"at most {len(gpus) // gpus_per_run if gpus else 0}, for {gpus_per_run} of {len(gpus)} GPUs each"
    require(not gpus or jobs * gpus_per_run <= len(gpus), "--jobs", jobs, allowed)
    running: dict[int, submitit.Job] = {}  # place -> its run
    waiting = list(todo)
    while waiting or running:
        running = {place: job for place, job in running.items() if not job.done()}
        for place in sorted(set(range(jobs)) - running.keys())[: len(waiting)]:
            print(f"run {len(todo) - len(waiting) + 1} of {len(todo)}: {waiting[0].key}", flush=True)
            if gpus:
                executor.update_parameters(local_visible_gpus=gpus[place * gpus_per_run : (place + 1) * gpus_per_run])
            running[place] = executor.submit(waiting.pop(0))
        time.sleep(0.2)


def visible_gpus() -> list[int]:
    """Numbers of the GPUs that this process may use; the local executor sets CUDA_VISIBLE_DEVICES by them."""
    import torch  # imported here: a grid on Slurm needs none

    given = [number for number in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if number.isdecimal()]
    return [int(number) for number in given] or list(range(torch.cuda.device_count()))
