"""The runs of a profile as jobs of a cluster: a real Slurm of this machine (slurm.sh), and without one."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest
from project import CAMPAIGN, STAGES, environment, read_profile, run, tiny_project, write_profile

pytestmark = pytest.mark.slow
ON_CPUS = ("--gpus-per-node", "0")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Two nodes of four CPUs each; the partition `urgent` preempts the default one."""
    path = f"{os.environ['PATH']}{os.pathsep}/usr/sbin"
    if missing := [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name, path=path)]:
        pytest.skip(f"there is no {', '.join(missing)}: apt-get install slurm-wlm munge")
    folder, script = tmp_path_factory.mktemp("slurm"), Path(__file__).with_name("slurm.sh")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", path)
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv("MASTER_ADDR", "127.0.0.1")  # no name service knows these nodes
        subprocess.run([script, "start", folder], check=True)
        try:
            yield
        finally:
            subprocess.run([script, "stop", folder], check=True)


@pytest.fixture
def project(tmp_path):
    return tiny_project(tmp_path)


def activate(root, epochs, **changes):
    profile = read_profile(root) | changes
    profile["pretrain"]["epochs"] = epochs
    write_profile(root, profile)
    run(*STAGES, "activate", "tiny", cwd=root)


def queued(output) -> dict[str, str]:
    """Key of a run -> its job."""
    return {key: job for job, key in (line.split() for line in output.splitlines() if " tiny-" in line)}


def slurm_says(*command) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def wait(condition, seconds=1200):
    """Until it holds, with whose value it returns."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.2)
    raise AssertionError(slurm_says("squeue"))


def idle() -> bool:
    return not slurm_says("squeue", "--noheader")


def scancel(signal, job) -> None:
    """To its step: for an element of an array as a whole, Slurm 22.05 repeats the signal until the job is gone."""
    slurm_says("scancel", f"--signal={signal}", f"{job}.0")


def trains(root, arm, seed):
    """Waits until a run has pre-trained for an epoch."""
    wait((root / f"results/tiny/runs/{arm}-{seed}/pretrain/log.csv").exists)


def said(root, key) -> str:
    return (root / f".scratch/{key}.log").read_text()


def recorded(root) -> set[tuple]:
    runs = pd.read_csv(root / "results/tiny/runs.csv")
    return set(zip(runs["arm"], runs["seed"], strict=True))


def test_a_grid_on_slurm(project, slurm, monkeypatch):
    """Six runs in one array job: one has no time left, one is requeued, one is killed and submitted again."""
    activate(project, 300, seeds=[0, 1, 2], arms={"default": 3, "scratch": 3})
    output = run(*CAMPAIGN, "submit", *ON_CPUS, "--jobs", "3", cwd=project)
    jobs = queued(output)
    assert "0 runs are recorded, 6 are to do" in output and len(jobs) == 6
    assert len({job.partition("_")[0] for job in jobs.values()}) == 1, "one array job"
    for seed in range(3):
        trains(project, "default", seed)
    scancel("USR2", jobs["tiny-default-0"])
    slurm_says("scontrol", "requeue", jobs["tiny-default-1"])
    scancel("KILL", jobs["tiny-default-2"])
    wait(idle)
    assert recorded(project) == {("default", 0), ("default", 1), ("scratch", 0), ("scratch", 1), ("scratch", 2)}
    for seed in (0, 1):
        step = int(said(project, f"tiny-default-{seed}").partition("resuming after step ")[2].partition(" of 600")[0])
        assert 2 <= step < 600

    # the one that was killed, now in two processes
    monkeypatch.setenv("SIMMIM_PROCESSES", "2")
    output = run(*CAMPAIGN, "submit", *ON_CPUS, cwd=project)
    assert "5 runs are recorded, 1 are to do" in output and list(queued(output)) == ["tiny-default-2"]
    wait(idle)
    assert "resuming after step" in said(project, "tiny-default-2")
    assert len(recorded(project)) == 6
    assert "6 runs are recorded, 0 are to do" in run(*CAMPAIGN, "submit", cwd=project)
    run(*STAGES, "ablations", cwd=project)
    table = pd.read_csv(project / "results/tiny/ablations.csv")
    assert table["arm"].tolist() == ["default", "scratch"] and table["seeds"].tolist() == [3, 3]


def test_a_run_on_two_nodes_is_preempted(project, slurm, monkeypatch):
    """A process on each node; both save, and the job is queued again when the urgent one has ended."""
    activate(project, 300, arms={"default": 1})
    two_nodes = (*CAMPAIGN, "submit", *ON_CPUS, "--nodes", "2")
    monkeypatch.setenv("SBATCH_PARTITION", "nosuch")
    output = run(*two_nodes, cwd=project, ok=False)
    assert "Slurm refused the jobs, nothing is queued: " in output and "invalid partition specified: nosuch" in output
    assert "Traceback" not in output and not list((project / ".scratch/jobs").iterdir())

    monkeypatch.delenv("SBATCH_PARTITION")
    run(*two_nodes, cwd=project)
    trains(project, "default", 0)
    slurm_says("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    wait(idle)
    assert recorded(project) == {("default", 0)}
    for name in ("tiny-default-0", "tiny-default-0-1"):
        assert "failed" not in said(project, name)
    assert 2 <= int(said(project, "tiny-default-0").partition("resuming after step ")[2].partition(" of 600")[0]) < 600


def test_jobs_by_hand(project, slurm):
    """The lines of the README: two nodes, told that the time is nearly over; then, on one node, to the end."""
    activate(project, 300, arms={"default": 1})
    run(*STAGES, "data", cwd=project)

    def sbatch(*options) -> str:
        line = f"--wrap=srun {' '.join(STAGES)} pretrain --arm default --seed 0"
        options = (*options, "--parsable", f"--chdir={project}", "--output=job.log", line)
        return subprocess.run(
            ["sbatch", *options], capture_output=True, text=True, check=True, env=environment()
        ).stdout

    job = sbatch("--nodes=2", "--ntasks-per-node=1").strip()
    trains(project, "default", 0)
    scancel("TERM", job)
    wait(idle)
    stopped = (project / "job.log").read_text()
    step = int(stopped.rpartition("stopped by a signal after step ")[2].partition(";")[0])
    assert 2 <= step < 600
    sbatch()
    wait(idle)
    assert f"resuming after step {step} of 600" in (project / "job.log").read_text()
    assert (project / "results/tiny/runs/default-0/pretrain/metrics.json").exists()


def test_without_slurm(project):
    """submitit's local executor, a run at a time; Ctrl-C lets the run save, and the next call resumes it."""
    activate(project, 300)
    command = [*CAMPAIGN, "submit", "--cluster", "local"]
    with subprocess.Popen(command, cwd=project, env=environment(), start_new_session=True) as process:
        trains(project, "default", 0)
        os.killpg(process.pid, signal.SIGINT)
    assert process.returncode != 0
    wait(lambda: "saved: start the same run again" in said(project, "tiny-default-0"))
    output = run(*command, cwd=project)
    assert "0 runs are recorded, 2 are to do" in output and "run 2 of 2: tiny-scratch-0" in output
    assert "resuming after step" in said(project, "tiny-default-0")
    assert recorded(project) == {("default", 0), ("scratch", 0)}
