"""Nothing is lost when a run dies, and what goes wrong is said."""

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from conftest import ROOT
from simmimlib import training
from simmimlib.finetune import finetune
from simmimlib.pretrain import pretrain
from simmimlib.scratch import Scratch, read
from test_training import finetune_settings, pretrain_settings


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """The rolling checkpoints of a test belong into its own folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def often(monkeypatch):
    """Looks at losses and saves at every second step."""
    monkeypatch.setattr(training, "CHECK_STEPS", 2)
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(training, "SAVE_SHARE", 1e9)


EVERYTHING = {"mixup": 0.8, "cutmix": 1.0, "erase": 0.25, "flip": True, "drop_path": 0.2, "crop_scale": 0.5}


@pytest.mark.parametrize(
    ("loop", "run", "settings", "changes"),
    [
        ("pretrain", pretrain, pretrain_settings, {"drop_path": 0.2, "crop_scale": 0.5, "flip": True, "epochs": 60}),
        ("finetune", finetune, finetune_settings, {**EVERYTHING, "epochs": 60, "eval_epochs": 7}),
    ],
)
def test_twenty_kills_change_nothing(tmp_path, packed_folder, loop, run, settings, changes):
    run(settings(packed_folder, tmp_path / "whole", **changes))
    killed = settings(packed_folder, tmp_path / "killed", **changes)
    command = [sys.executable, str(ROOT / "tests/killed_runs.py"), loop, json.dumps(vars(killed)), "20"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "once after them" in done.stdout, done.stdout + done.stderr
    assert "going on after step" in done.stdout
    for name in ("model.safetensors", "log.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not list((tmp_path / ".scratch/runs").iterdir()), "a finished run leaves no checkpoint"


def interrupt_after(monkeypatch, steps):
    """Stops the process's runs after so many steps, as a crash would."""
    step = training.Training._step

    def crash(self, inputs, i):
        if self.step == steps:
            raise ZeroDivisionError("crash")
        step(self, inputs, i)

    monkeypatch.setattr(training.Training, "_step", crash)


def crashed(monkeypatch, settings, steps) -> list[Path]:
    """A run that crashed after so many steps; its checkpoints, newest first."""
    with monkeypatch.context() as patch:
        interrupt_after(patch, steps)
        with pytest.raises(ZeroDivisionError):
            pretrain(settings)
    (folder,) = (Path.cwd() / ".scratch/runs").iterdir()
    return sorted(folder.glob("*.ckpt"), reverse=True)


def test_the_last_two_checkpoints_are_kept(tmp_path, packed_folder, often, monkeypatch):
    files = crashed(monkeypatch, pretrain_settings(packed_folder, tmp_path / "run"), 9)
    assert [file.stem for file in files] == ["step-0000000008", "step-0000000006"]
    assert not (tmp_path / "run/metrics.json").exists()
    assert len(pd.read_csv(tmp_path / "run/log.csv")) == 4, "the log can be read while a run is under way"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[: len(content) // 2], "is damaged or cut off: its checksum does not fit"),
        (lambda content: content[:-1] + b"x", "is damaged or cut off: its checksum does not fit"),
        (lambda content: b"something else", "is not a checkpoint of simmimlib's training"),
        (lambda content: b"", "is not a checkpoint of simmimlib's training"),
    ],
)
def test_damaged_checkpoints_are_set_aside(tmp_path, packed_folder, often, monkeypatch, capfd, damage, message):
    whole = pretrain(pretrain_settings(packed_folder, tmp_path / "whole"))
    settings = pretrain_settings(packed_folder, tmp_path / "run")
    newest, before = crashed(monkeypatch, settings, 9)
    newest.write_bytes(damage(newest.read_bytes()))
    again = pretrain(settings)
    told = capfd.readouterr().out
    assert f"{newest} {message}; set aside as {newest.stem}.unreadable" in told
    assert f"going on after step {int(before.stem[-10:])} of 30" in told
    assert again["loss"] == whole["loss"] and again["val_loss"] == whole["val_loss"]


def test_without_a_readable_checkpoint_a_run_starts_anew(tmp_path, packed_folder, often, monkeypatch, capfd):
    settings = pretrain_settings(packed_folder, tmp_path / "run", epochs=3)
    for path in crashed(monkeypatch, settings, 5):
        path.write_bytes(b"no")
    assert pretrain(settings)["images_seen"] == 48
    told = capfd.readouterr().out
    assert told.count("set aside") == 2 and "going on" not in told


def test_other_settings_or_data_are_another_run(tmp_path, packed_folder, often, monkeypatch, capfd):
    crashed(monkeypatch, pretrain_settings(packed_folder, tmp_path / "run"), 5)
    pretrain(pretrain_settings(packed_folder, tmp_path / "run", seed=1, epochs=2))
    assert "going on" not in capfd.readouterr().out
    labels = Path(packed_folder, "train_labels.npy")
    labels.write_bytes(labels.read_bytes()[:-1] + b"\1")
    pretrain(pretrain_settings(packed_folder, tmp_path / "run", epochs=2))
    assert "going on" not in capfd.readouterr().out


def test_an_unfinished_run_is_not_taken_for_the_finished_one_before_it(tmp_path, packed_folder, monkeypatch):
    pretrain(pretrain_settings(packed_folder, tmp_path / "run", epochs=1))
    crashed(monkeypatch, pretrain_settings(packed_folder, tmp_path / "run", epochs=2), 3)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["log.csv"]


SCRIPT = """
import json, sys
from simmimlib.pretrain import PretrainSettings, pretrain
from simmimlib.training import Training
say = Training._row
Training._row = lambda self: print("epoch done", flush=True) or say(self)
pretrain(PretrainSettings.from_values(json.loads(sys.argv[1])))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_end_non_zero(tmp_path, packed_folder, number):
    whole = pretrain(pretrain_settings(packed_folder, tmp_path / "whole", epochs=500))
    settings = pretrain_settings(packed_folder, tmp_path / "run", epochs=500)
    command = [sys.executable, "-c", SCRIPT, json.dumps(vars(settings))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.send_signal(number)
        _, errors = process.communicate()
    assert process.returncode != 0
    step = int(errors.strip().rpartition("stopped by a signal after step ")[2].partition(";")[0])
    assert "saved: start the same run again to go on" in errors and 2 <= step < 1000
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"going on after step {step} of 1000" in done.stdout
    assert json.loads((tmp_path / "run/metrics.json").read_text())["val_loss"] == whole["val_loss"]


def test_two_runs_with_the_same_settings(tmp_path, packed_folder, monkeypatch):
    monkeypatch.setattr("simmimlib.scratch.LOCK_SECONDS", 0.1)
    settings = pretrain_settings(packed_folder, tmp_path / "run", epochs=1)
    inner = []

    def second(rows):
        with pytest.raises(RuntimeError, match="another process is training with exactly these settings"):
            pretrain(settings)
        inner.append(True)

    pretrain(settings, on_epoch=second)
    assert inner


def poison(monkeypatch, steps):
    """Makes the loss of these steps not a number, once each time they are computed."""
    update = training.Training._update

    def poisoned(self, inputs):
        factor = float("nan") if self.step in steps else 1.0
        return update(self, (inputs[0] * factor, *inputs[1:]))

    monkeypatch.setattr(training.Training, "_update", poisoned)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, packed_folder, often, monkeypatch):
    poison(monkeypatch, {6})
    settings = pretrain_settings(packed_folder, tmp_path / "run")
    with pytest.raises(FloatingPointError) as error:
        pretrain(settings)
    message = str(error.value)
    assert (
        "the loss is nan and the norm of the gradient nan at step 6 (epoch 4, batch 1 of 2, learning rate 0.00"
        in message
    )
    assert "of the training images" in message and "with skip_nonfinite = 1 to go on" in message
    kept = Path(message.rpartition("The last good checkpoint is ")[2].partition(": start")[0])
    state = torch.load(io.BytesIO(read(kept)), weights_only=True)
    assert state["step"] == 6 and all(tensor.isfinite().all() for tensor in state["model"].values())

    # the same run, asked to leave such batches out, goes on from there
    metrics = pretrain(pretrain_settings(packed_folder, tmp_path / "run", skip_nonfinite=1))
    log = pd.read_csv(tmp_path / "run/log.csv")
    assert metrics["skipped_steps"] == 1 and log["skipped"].tolist() == [0] * 3 + [1] * 12
    assert log["loss"].notna().all() and metrics["loss"] < 0.7 * log["loss"][0]


def test_more_bad_batches_than_allowed(tmp_path, packed_folder, often, monkeypatch):
    poison(monkeypatch, {3, 8, 13})
    with pytest.raises(FloatingPointError, match=r"at step 13 .* skip_nonfinite = 3 to go on"):
        pretrain(pretrain_settings(packed_folder, tmp_path / "run", skip_nonfinite=2))


def test_skipping_goes_back_to_the_last_checkpoint(tmp_path, packed_folder, monkeypatch):
    """However far that is: with the loss looked at once an epoch the weights are spoilt long before it is seen."""
    poison(monkeypatch, {4})
    metrics = pretrain(pretrain_settings(packed_folder, tmp_path / "run", skip_nonfinite=1))
    assert metrics["skipped_steps"] == 1 and metrics["val_loss"] > 0


def test_out_of_memory_says_what_fits(tmp_path, packed_folder, monkeypatch):
    forward = training.Objective.forward

    def full(self, *inputs):
        if len(inputs[0]) > 3:
            raise torch.OutOfMemoryError("tried to allocate")
        return forward(self, *inputs)

    monkeypatch.setattr(training.Objective, "forward", full)
    settings = pretrain_settings(packed_folder, tmp_path / "run", epochs=2)
    with pytest.raises(torch.OutOfMemoryError, match=r"8 images a step on cpu do not fit; 2 at a time do: set .*=2"):
        pretrain(settings)
    monkeypatch.setenv("SIMMIM_MICRO_BATCH", "2")
    assert pretrain(settings)["images_seen"] == 32


def test_accumulation_gives_the_same_curve(tmp_path, packed_folder, monkeypatch):
    for name, part in (("whole", "8"), ("parts", "3")):
        monkeypatch.setenv("SIMMIM_MICRO_BATCH", part)
        pretrain(pretrain_settings(packed_folder, tmp_path / name))
    whole, parts = (pd.read_csv(tmp_path / name / "log.csv") for name in ("whole", "parts"))
    torch.testing.assert_close(torch.tensor(parts.values), torch.tensor(whole.values), rtol=1e-4, atol=1e-5)
    monkeypatch.setenv("SIMMIM_MICRO_BATCH", "half")
    with pytest.raises(ValueError, match="SIMMIM_MICRO_BATCH = 'half': must be a number above 0"):
        pretrain(pretrain_settings(packed_folder, tmp_path / "whole"))


def test_results_that_cannot_be_written(packed_folder):
    with pytest.raises(OSError, match=r"out = '/proc/run': must be a folder that can be written to"):
        pretrain(pretrain_settings(packed_folder, "/proc/run"))


def test_a_full_disk_is_said(tmp_path, often):
    """A limit on the size of files stands in for the full disk: the system refuses in the same place."""
    code = (
        "import resource, torch; from simmimlib.scratch import Scratch\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "Scratch({'a': 1}).save({'step': 1, 'x': torch.zeros(10_000)})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0
    assert "the checkpoint of 0.000 GB could not be written" in done.stderr and "GB are free there" in done.stderr
    assert not list(tmp_path.rglob("*.partial")) and not list(tmp_path.rglob("*.ckpt"))


def test_a_checkpoint_is_proven_before_an_older_one_goes(tmp_path, monkeypatch):
    scratch = Scratch({"a": 1})
    for step in (1, 2):
        scratch.save({"step": step})
    monkeypatch.setattr("simmimlib.scratch.read", lambda path: (_ for _ in ()).throw(ValueError("unreadable")))
    with pytest.raises(ValueError, match="unreadable"):
        scratch.save({"step": 3})
    assert [path.stem[-1] for path in scratch.files()] == ["3", "2", "1"]


def test_deterministic(tmp_path, packed_folder):
    seen = []
    settings = pretrain_settings(packed_folder, tmp_path / "run", deterministic=True, epochs=1)
    pretrain(settings, on_epoch=lambda rows: seen.append(torch.are_deterministic_algorithms_enabled()))
    assert seen == [True] and not torch.are_deterministic_algorithms_enabled()


def test_runs_under_way_are_seen_line_by_line(tmp_path, packed_folder, capfd):
    pretrain(pretrain_settings(packed_folder, tmp_path / "run", epochs=2))
    lines = capfd.readouterr().out.strip().splitlines()
    assert len(lines) == 2 and lines[1].startswith("pretrain epoch 2/2: loss ")
    assert "img/s" in lines[1] and lines[1].endswith("0 s left")
