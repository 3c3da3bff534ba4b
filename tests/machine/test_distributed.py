"""Several processes give what one gives."""

import json
import os
import subprocess
import sys

import pandas as pd
import pytest
import torch

from simmimlib.machine.distributed import (
    launch,
    local_shard,
    process_count,
    rank,
    read_slurm,
    sum_over_ranks,
    world_size,
)
from simmimlib.train.finetune import finetune
from simmimlib.train.pretrain import pretrain
from small_runs import METHODS, finetune_settings, pretrain_settings


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def compare(tmp_path, run, settings, packed, monkeypatch, **changes):
    one = run(settings(packed, tmp_path / "one", **changes))
    monkeypatch.setenv("SIMMIM_PROCESSES", "2")
    two = run(settings(packed, tmp_path / "two", **changes))
    logs = [torch.tensor(pd.read_csv(tmp_path / name / "log.csv").values) for name in ("one", "two")]
    torch.testing.assert_close(logs[1], logs[0], rtol=1e-3, atol=1e-5, equal_nan=True)
    assert one.keys() == two.keys() and one["images_seen"] == two["images_seen"]
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("one", "two")]
    assert files[0] == files[1], "the first process writes, once"
    return one, two


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_pretrain_as_one(tmp_path, packed_folder, monkeypatch, method):
    changes = {**METHODS[method], "epochs": 6, "crop_scale": 0.5, "flip": True}
    one, two = compare(tmp_path, pretrain, pretrain_settings, packed_folder, monkeypatch, **changes)
    assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-3)
    assert two == json.loads((tmp_path / "two/metrics.json").read_text())


@pytest.mark.slow
def test_two_processes_finetune_as_one(tmp_path, packed_folder, monkeypatch):
    changes = {"epochs": 6, "crop_scale": 0.5, "eval_epochs": 2}
    one, two = compare(tmp_path, finetune, finetune_settings, packed_folder, monkeypatch, **changes)
    assert two["top1"] == one["top1"]
    confusion = [pd.read_csv(tmp_path / name / "confusion.csv") for name in ("one", "two")]
    assert confusion[0].equals(confusion[1]) and confusion[1].to_numpy().sum() == 16, "validation is shared out"


@pytest.mark.slow
def test_two_processes_accumulate_as_one(tmp_path, packed_folder, monkeypatch):
    """Gradients are exchanged with the last part alone."""
    monkeypatch.setenv("SIMMIM_MICRO_BATCH", "3")
    one, two = compare(tmp_path, pretrain, pretrain_settings, packed_folder, monkeypatch, epochs=4)
    assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-3)


@pytest.mark.slow
def test_under_torchrun(tmp_path, packed_folder):
    """Every process runs the same script, as on several machines."""
    settings = pretrain_settings(packed_folder, tmp_path / "run", epochs=2)
    (tmp_path / "script.py").write_text(
        "import json, sys\nfrom simmimlib.train.pretrain import pretrain\n"
        "from simmimlib.train.settings import PretrainSettings\n"
        "metrics = pretrain(PretrainSettings.from_values(json.loads(sys.argv[1])))\n"
        "assert metrics['images_seen'] == 32\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "script.py"]
    done = subprocess.run([*command, json.dumps(vars(settings))], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pretrain epoch 2/2") == 1
    assert (tmp_path / "run/metrics.json").exists()


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared(tmp_path, packed_folder, monkeypatch):
    monkeypatch.setenv("SIMMIM_PROCESSES", "2")
    with pytest.raises(Exception, match="batch_size = 5: must be a multiple of 2 processes"):
        pretrain(pretrain_settings(packed_folder, tmp_path / "run", batch_size=5))


@pytest.mark.slow
def test_two_processes_resume_after_a_kill(tmp_path, packed_folder, monkeypatch, capfd):
    """Also with another number of processes (no part of a run's identity), and with a damaged file."""
    script = (
        "import json, os, sys\nfrom simmimlib.train import losses, loop, resume\n"
        "losses.CHECK_STEPS, resume.SAVE_SECONDS, resume.SAVE_SHARE = 2, 0.0, 1e9\n"
        "step = loop.forward_backward\n"
        "loop.forward_backward = lambda run, *a: os.kill(os.getpid(), 9) if run.step == 7 else step(run, *a)\n"
        "from simmimlib.train.pretrain import pretrain\nfrom simmimlib.train.settings import PretrainSettings\n"
        "pretrain(PretrainSettings.from_values(json.loads(sys.argv[1])))\n"
    )
    (tmp_path / "script.py").write_text(script)
    whole = pretrain(pretrain_settings(packed_folder, tmp_path / "whole", epochs=6))
    settings = pretrain_settings(packed_folder, tmp_path / "run", epochs=6)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "script.py"]
    done = subprocess.run([*command, json.dumps(vars(settings))], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0
    (newest,) = (tmp_path / ".scratch/runs").glob("*/step-0000000006.ckpt")
    newest.write_bytes(b"cut off")
    monkeypatch.setenv("SIMMIM_PROCESSES", "2")
    assert pretrain(settings)["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-3)
    told = capfd.readouterr().out
    assert "resuming after step 4 of 12" in told and told.count("set aside") == 1, "the first process sets it aside"
    assert len(pd.read_csv(tmp_path / "run/log.csv")) == 6


@pytest.mark.slow
def test_two_processes_save_when_they_are_stopped(tmp_path, packed_folder):
    settings = pretrain_settings(packed_folder, tmp_path / "run", epochs=500)
    (tmp_path / "script.py").write_text(
        "import json, sys\nfrom simmimlib.train.pretrain import pretrain\n"
        "from simmimlib.train.settings import PretrainSettings\n"
        "if __name__ == '__main__':\n    pretrain(PretrainSettings.from_values(json.loads(sys.argv[1])))\n"
    )
    command = [sys.executable, "script.py", json.dumps(vars(settings))]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": tmp_path}
    environment = os.environ | {"SIMMIM_PROCESSES": "2"}
    with subprocess.Popen(command, **options, env=environment) as process:
        while "epoch 1/" not in process.stdout.readline():
            pass
        process.terminate()
        process.communicate()
    assert process.returncode != 0
    done = subprocess.run(command, **options, env=environment)
    assert done.returncode == 0, done.stdout
    step = int(done.stdout.partition("resuming after step ")[2].partition(" of 1000")[0])
    assert 0 < step < 1000 and (tmp_path / "run/metrics.json").exists()


def test_slurm_is_translated(monkeypatch, tmp_path):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "before")  # so that what is set in the test is undone after it
        monkeypatch.delenv(name)
    (tmp_path / "scontrol").write_text("#!/bin/sh\nprintf 'node7\\nnode8\\n'\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_PROCID", "0")
    read_slurm()
    assert "RANK" not in os.environ, "a batch script is no step of several tasks"
    values = {"STEP_ID": "0", "STEP_NUM_TASKS": "16", "PROCID": "11", "LOCALID": "3", "JOB_ID": "123456"}
    values |= {"STEP_TASKS_PER_NODE": "8(x2)", "STEP_NODELIST": "node[7-8]"}
    for name, value in values.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    read_slurm()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [os.environ[name] for name in names] == ["11", "16", "3", "8", "node7", "23456"]


def test_one_device_runs_in_this_process(monkeypatch):
    monkeypatch.delenv("SIMMIM_PROCESSES", raising=False)
    assert process_count() == 1
    assert launch(lambda settings, on_epoch: (settings, os.getpid()), "settings") == ("settings", os.getpid())
    monkeypatch.setenv("SIMMIM_PROCESSES", "two")
    with pytest.raises(ValueError, match="SIMMIM_PROCESSES = 'two': must be a number above 0"):
        process_count()


def test_alone_a_process_has_all():
    values = torch.arange(5)
    assert (rank(), world_size()) == (0, 1)
    assert local_shard(values).equal(values) and sum_over_ranks(values.clone()).equal(values)
