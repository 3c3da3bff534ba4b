"""What a campaign starts, what it leaves out, and how it ends it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from project import CAMPAIGN, copy_project, environment, write_profile

from simmimlib.pipeline import cluster
from simmimlib.pipeline import running as running_module
from simmimlib.pipeline.arms import STAGES
from simmimlib.pipeline.campaign import minutes_left
from simmimlib.pipeline.cluster import RunJob
from simmimlib.pipeline.profiles import activate, read_params
from simmimlib.pipeline.running import Running, by_key, commands


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the project with a profile of two runs, and this process in it; nothing is packed or trained."""
    root = copy_project(tmp_path / "project")
    profile = {"profile": "tiny", "seeds": [0], "arms": {"default": 1, "scratch": 1}, "data": {"data": "mnist5k"}}
    write_profile(root, profile | {"model": {}, "pretrain": {"epochs": 2}, "finetune": {"epochs": 2}})
    monkeypatch.chdir(root)
    activate("tiny")
    pack("ours")
    return root


def pack(digest):
    folder = Path("data/packed/tiny")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps({"digest": digest}))


def finish_stage(root, stage, given):
    """As `run_notebook` leaves it."""
    folder = root / f"results/tiny/runs/default-0/{stage}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text('{"data_digest": "ours"}')
    (folder / "parameters.json").write_text(json.dumps({"data": given["data"], stage: given[stage]}))
    (folder / f"{STAGES[stage]}.ipynb").write_text("{}")
    return folder


def stages_of(params, wanted):
    return [command[3] for command in commands(params, wanted)]


def test_a_run_goes_on_with_the_stage_that_it_lacks(project):
    params = read_params()
    wanted = by_key(params)["tiny-default-0"]
    assert stages_of(params, wanted) == ["pretrain", "finetune", "probe"]
    finish_stage(project, "pretrain", wanted["stages"])
    assert stages_of(params, wanted) == ["finetune", "probe"]
    finish_stage(project, "finetune", wanted["stages"])
    probed = finish_stage(project, "probe", wanted["stages"])
    assert stages_of(params, wanted) == []
    pack("other images")
    assert stages_of(params, wanted) == ["pretrain", "finetune", "probe"]

    pack("ours")
    for stage in ("pretrain", "finetune", "probe"):
        finish_stage(project, stage, wanted["stages"])
    assert stages_of(params, wanted) == []

    # what follows on a training that has to be repeated is repeated, also if the repetition is interrupted
    (project / "results/tiny/runs/default-0/pretrain/02_pretrain.ipynb").unlink()
    assert stages_of(params, wanted) == ["pretrain", "finetune", "probe"]
    finish_stage(project, "pretrain", wanted["stages"])
    assert stages_of(params, wanted) == ["finetune", "probe"] and not (probed / "metrics.json").exists()

    # as it is when it was given other values
    params["pretrain"]["epochs"] = 3
    assert stages_of(params, by_key(params)["tiny-default-0"]) == ["pretrain", "finetune", "probe"]


def test_a_run_that_does_not_stop_is_killed(project, monkeypatch):
    monkeypatch.setattr(running_module, "PATIENCE", 0.5)
    deaf = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    )
    running = Running("deaf", [[sys.executable, "-c", deaf]])
    while "deaf" not in running.log.read_text():
        time.sleep(0.05)
    running.stop()
    running.finish()
    assert running.process.wait() == -signal.SIGKILL


def test_a_run_may_end_while_it_is_being_killed(project, monkeypatch):
    running = Running("short", [[sys.executable, "-c", ""]])

    def too_late(seconds):
        os.waitpid(running.process.pid, 0)  # it is gone, and its number free, before `finish` looks for its children
        raise subprocess.TimeoutExpired("short", seconds)

    monkeypatch.setattr(running.process, "wait", too_late)
    running.finish()


def test_a_run_outlives_what_slurm_says_to_all(project):
    """SIGUSR2 is for the job, which then stops its run."""
    running = Running("waits", [[sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(60)"]])
    while "ready" not in running.log.read_text():
        time.sleep(0.05)
    os.kill(running.process.pid, signal.SIGUSR2)
    time.sleep(0.2)
    assert running.process.poll() is None
    running.stop()
    assert running.process.wait() != 0


def test_a_run_is_trained_by_one_campaign_at_a_time(project, capsys, monkeypatch):
    params = read_params()
    wanted = by_key(params)["tiny-default-0"]
    monkeypatch.setattr(running_module, "commands", lambda *of: [[sys.executable, "-c", "input()"]])
    first = running_module.claim("tiny-default-0", params, wanted)
    assert running_module.claim("tiny-default-0", params, wanted) is None
    assert capsys.readouterr().out == "tiny-default-0 is left out: another campaign or job is at it\n"
    first.stop()
    first.finish()
    again = running_module.claim("tiny-default-0", params, wanted)
    again.process.wait()
    assert again.ended()
    monkeypatch.setattr(running_module, "commands", lambda *of: [])
    assert running_module.claim("tiny-default-0", params, wanted) is None
    assert capsys.readouterr().out == "", "it is finished"


def test_runs_at_a_time_have_gpus_of_their_own(monkeypatch):
    taken, jobs = [], []

    class Executor:
        def update_parameters(self, local_visible_gpus):
            taken.append(local_visible_gpus)

        def submit(self, job):
            jobs.append(SimpleNamespace(done=lambda: len(taken) > 2 or job.key == "b"))
            return jobs[-1]

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,7,1")
    todo = [SimpleNamespace(key=key) for key in "abc"]
    cluster.run_here(Executor(), todo, 2, 2)
    assert taken == [[2, 5], [7, 1], [7, 1]], "the third is in the place of the second"
    with pytest.raises(ValueError, match="--jobs = 3: must be at most 2, for 2 of 4 GPUs each"):
        cluster.run_here(Executor(), todo, 3, 2)


def test_a_job_of_another_profile_is_refused(project, monkeypatch):
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    job = RunJob("tiny-default-0", by_key(read_params())["tiny-default-0"])
    params = read_params()
    params["pretrain"]["epochs"] = 3
    monkeypatch.setattr(cluster, "read_params", lambda: params)
    with pytest.raises(ValueError, match=r"tiny-default-0: params.yaml holds other values than when this job was subm"):
        job()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cluster": "slurm"}, "--cluster = 'slurm': must be local here: there is no `srun`"),
        ({"nodes": 2}, "--nodes = 2: must be 1 where there is no Slurm"),
        ({"minutes": 3}, "--minutes = 3: must be at least 5"),
    ],
)
def test_what_cannot_be_submitted(project, monkeypatch, options, message):
    monkeypatch.setattr(cluster.shutil, "which", lambda name: None)
    values = {"cluster": None, "nodes": 1, "gpus_per_node": 0, "cpus_per_task": None, "minutes": 240, "jobs": None}
    with pytest.raises(ValueError, match=message):
        cluster.submit(read_params(), **values | options)
    assert not (project / ".scratch").exists()


def test_submit_says_what_it_needs(project):
    code = "import sys; sys.modules['submitit'] = None; sys.argv[1:] = ['submit']; import runpy; runpy.run_module("
    command = [sys.executable, "-c", f"{code}'simmimlib.pipeline.campaign', run_name='__main__')"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 1
    assert done.stderr.strip().endswith("by submitit, which is missing: pip install submitit"), done.stderr
    assert "SBATCH_PARTITION" in subprocess.run([*CAMPAIGN, "--help"], capture_output=True, text=True).stdout


def test_a_run_under_way_says_where_it_stands(tmp_path, monkeypatch):
    """Ten runs of an hour each must not be silent for an hour."""
    monkeypatch.chdir(tmp_path)
    said = "finetune epoch 10/20: loss 1.2, top1 45.2, 270 img/s, 30 s left"
    one = Running("mine-default-0", [[sys.executable, "-c", f"print({said!r} + chr(10))"]])
    one.process.wait()
    assert one.standing() == f"mine-default-0, 0.0 min: {said}"
    one.log.write_text("")
    assert one.standing() == "mine-default-0, 0.0 min: ..."


def test_time_left_knows_that_runs_without_pretraining_are_short():
    running = [(True, 8.0), (False, 1.0)]
    assert minutes_left(running, [], {True: 10.0, False: 3.0}, 2) == 2
    assert minutes_left(running, [True, False, False], {True: 10.0, False: 3.0}, 2) == 12
    assert minutes_left(running[:1], [False], {True: 10.0}, 1) == 12, "of a kind that is not known yet, the other's"
    assert minutes_left(running[:1], [], {True: 5.0}, 1) == 0
