"""Nothing is lost when a run dies."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from simmimlib.data.packed import open_packed
from simmimlib.data.packing import pack
from simmimlib.data.sources import DataSettings
from simmimlib.machine import statements
from simmimlib.train import resume
from simmimlib.train.finetune import finetune
from simmimlib.train.pretrain import pretrain
from simmimlib.train.resume import KEEP_DAYS, RollingCheckpoint, identity
from small_runs import METHODS, crashed, finetune_settings, pretrain_settings

CROPS = {"drop_path": 0.2, "crop_scale": 0.5, "flip": True}
EVERYTHING = {"mixup": 0.8, "cutmix": 1.0, "random_erasing": 0.25, **CROPS}


# Killed and started again ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loop", "run", "settings", "changes"),
    [
        ("pretrain", pretrain, pretrain_settings, {**CROPS, "epochs": 60}),
        ("finetune", finetune, finetune_settings, {**EVERYTHING, "epochs": 60, "eval_epochs": 7}),
    ],
)
def test_twenty_kills_change_nothing(tmp_path, packed_folder, loop, run, settings, changes):
    run(settings(packed_folder, tmp_path / "whole", **changes))
    killed = settings(packed_folder, tmp_path / "killed", **changes)
    script = Path(__file__).with_name("killed_runs.py")
    command = [sys.executable, str(script), loop, json.dumps(vars(killed)), "20"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "once after them" in done.stdout, done.stdout + done.stderr
    assert "resuming after step" in done.stdout
    for name in ("model.safetensors", "log.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not list((tmp_path / ".scratch/runs").iterdir()), "a finished run leaves no checkpoint"


@pytest.mark.parametrize(
    ("run", "settings", "changes"),
    [
        *((pretrain, pretrain_settings, {**METHODS[name], **CROPS}) for name in METHODS),
        (finetune, finetune_settings, {**EVERYTHING, "eval_epochs": 2}),
    ],
)
def test_a_crash_in_the_middle_of_an_epoch_changes_nothing(
    tmp_path, packed_folder, often, monkeypatch, capfd, run, settings, changes
):
    """Of four steps an epoch: the last checkpoint lies in the middle of the second."""
    values = {"batch_size": 4, "epochs": 5, **changes}
    run(settings(packed_folder, tmp_path / "whole", **values))
    again = settings(packed_folder, tmp_path / "again", **values)
    newest, _ = crashed(monkeypatch, again, 7, run)
    assert newest.stem == "step-0000000006"
    run(again)
    assert "resuming after step 6 of 20" in capfd.readouterr().out
    for name in ("model.safetensors", "log.csv"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    whole, resumed = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "again"))
    assert not list((tmp_path / ".scratch/runs").iterdir()), "a finished run leaves no checkpoint"
    times = {"images_per_second", "wall_seconds"}
    assert all(whole[name] == resumed[name] for name in whole.keys() - times), "images seen are those of both parts"


def test_the_last_two_checkpoints_are_kept(tmp_path, packed_folder, often, monkeypatch):
    files = crashed(monkeypatch, pretrain_settings(packed_folder, tmp_path / "run"), 9)
    assert [file.stem for file in files] == ["step-0000000008", "step-0000000006"]
    assert not (tmp_path / "run/metrics.json").exists()


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
    assert f"resuming after step {int(before.stem[-10:])} of 30" in told
    assert again["loss"] == whole["loss"] and again["val_loss"] == whole["val_loss"]


def test_without_a_readable_checkpoint_a_run_starts_anew(tmp_path, packed_folder, often, monkeypatch, capfd):
    settings = pretrain_settings(packed_folder, tmp_path / "run", epochs=3)
    for path in crashed(monkeypatch, settings, 5):
        path.write_bytes(b"no")
    assert pretrain(settings)["images_seen"] == 48
    told = capfd.readouterr().out
    assert told.count("set aside") == 2 and "resuming" not in told


def test_an_unfinished_run_is_not_taken_for_the_finished_one_before_it(tmp_path, packed_folder, monkeypatch):
    pretrain(pretrain_settings(packed_folder, tmp_path / "run", epochs=1))
    crashed(monkeypatch, pretrain_settings(packed_folder, tmp_path / "run", epochs=2), 3)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["log.csv"]


# Signals --------------------------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
from simmimlib.train.pretrain import pretrain
from simmimlib.train.run import Run
from simmimlib.train.settings import PretrainSettings
end_epoch = Run.end_epoch
Run.end_epoch = lambda self, evaluated: print("epoch done", flush=True) or end_epoch(self, evaluated)
pretrain(PretrainSettings.from_values(json.loads(sys.argv[1])))
"""


@pytest.mark.slow
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
    assert "saved: start the same run again to resume" in errors and 2 <= step < 1000
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"resuming after step {step} of 1000" in done.stdout
    assert json.loads((tmp_path / "run/metrics.json").read_text())["val_loss"] == whole["val_loss"]


def test_a_signal_within_this_process(tmp_path, packed_folder, capfd):
    """Saved at once, though neither the next check nor the next save is due."""
    settings = pretrain_settings(packed_folder, tmp_path / "run", epochs=3, batch_size=4)

    def stop(rows):
        if len(rows) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="stopped by a signal after step 5; saved: start the same run again"):
        pretrain(settings, on_epoch=stop)
    assert signal.getsignal(signal.SIGTERM) is before
    assert pretrain(settings)["images_seen"] == 48
    assert "resuming after step 5 of 12" in capfd.readouterr().out


# Whose checkpoint it is -----------------------------------------------------------------------------------------------


def test_two_runs_with_the_same_settings(tmp_path, packed_folder, monkeypatch):
    monkeypatch.setattr(resume, "LOCK_SECONDS", 0.1)
    settings = pretrain_settings(packed_folder, tmp_path / "run", epochs=1)
    inner = []

    def second(rows):
        with pytest.raises(RuntimeError, match="another process is training with exactly these settings"):
            pretrain(settings)
        inner.append(True)

    pretrain(settings, on_epoch=second)
    assert inner


def test_other_settings_or_data_are_another_run(tmp_path, packed_folder, often, monkeypatch, capfd):
    crashed(monkeypatch, pretrain_settings(packed_folder, tmp_path / "run"), 5)
    pretrain(pretrain_settings(packed_folder, tmp_path / "run", seed=1, epochs=2))
    assert "resuming" not in capfd.readouterr().out
    image = next((tmp_path / "images/train/dark").iterdir())
    Image.new("RGB", (16, 16)).save(image)
    pack(DataSettings(data="folder", path=str(tmp_path / "images"), size=16, channels=3, out=packed_folder))
    pretrain(pretrain_settings(packed_folder, tmp_path / "run"))
    assert "resuming" not in capfd.readouterr().out


def test_what_a_run_is_known_by(tmp_path, packed_folder):
    data, settings = open_packed(packed_folder), finetune_settings(packed_folder, tmp_path / "run")
    (tmp_path / "one").write_bytes(b"weights")
    (tmp_path / "same").write_bytes(b"weights")
    (tmp_path / "other").write_bytes(b"other weights")

    def key(title="finetune", starts_from=tmp_path / "one", device="cpu", dtype=torch.float32, **changes):
        changed = finetune_settings(packed_folder, tmp_path / "run", **changes)
        return RollingCheckpoint(
            identity(title, changed, data, str(starts_from), torch.device(device), dtype), settings.out
        ).folder

    assert key() == key() == key(starts_from=tmp_path / "same") == key(skip_nonfinite=3)
    others = [key("pretrain"), key(starts_from=tmp_path / "other"), key(seed=1), key(clip_grad=4.0)]
    others += [key(device="cuda"), key(dtype=torch.bfloat16)]
    assert len({key(), *others}) == 7


def test_a_changed_statement_is_another_run_and_a_changed_docstring_is_not(tmp_path, packed_folder, monkeypatch):
    data, settings = open_packed(packed_folder), pretrain_settings(packed_folder, tmp_path / "run")
    shutil.copytree(statements.LIBRARY, tmp_path / "simmimlib")
    monkeypatch.setattr(statements, "LIBRARY", tmp_path / "simmimlib")

    def key():
        statements.training_code.cache_clear()
        return RollingCheckpoint(
            identity("pretrain", settings, data, "", torch.device("cpu"), torch.float32), settings.out
        ).folder

    def edit(module, before="", after=""):
        path = tmp_path / "simmimlib" / module
        path.write_text(before + path.read_text() + after)

    try:
        first = key()
        edit("train/loop.py", before='"""Another docstring."""\n', after="\n\n# another comment\n")
        edit("report/figures.py", after="\nOTHER = 1\n")  # a figure moves no number
        assert key() == first
        edit("train/loop.py", after="\nOTHER = 1\n")
        second = key()
        edit("model/simmim.py", after="\nOTHER = 1\n")
        assert len({first, second, key()}) == 3
    finally:
        monkeypatch.undo()
        statements.training_code.cache_clear()


def test_an_abandoned_run_of_the_same_out_is_named(tmp_path, packed_folder, often, monkeypatch, capfd):
    out = tmp_path / "run"
    newest, _ = crashed(monkeypatch, pretrain_settings(packed_folder, out), 5)
    (elsewhere,) = crashed(monkeypatch, pretrain_settings(packed_folder, tmp_path / "elsewhere"), 0)
    capfd.readouterr()
    pretrain(pretrain_settings(packed_folder, out, epochs=1, clip_grad=4.0))
    told = capfd.readouterr().out
    assert (
        f"an unfinished run for {out} with other settings, data or code is not resumed; its checkpoint {newest} is "
        f"kept for {KEEP_DAYS} days"
    ) in told
    assert told.count("an unfinished run") == 1 and str(elsewhere) not in told
    assert newest.exists() and elsewhere.exists()
    pretrain(pretrain_settings(packed_folder, out))
    assert "resuming after step 4 of 30" in capfd.readouterr().out, "it can still be resumed"


def test_an_old_abandoned_run_is_deleted(tmp_path, packed_folder, often, monkeypatch, capfd):
    """By its newest checkpoint, whatever its `out`."""

    def age(path, days):
        then = time.time() - days * 86400
        os.utime(path, (then, then))

    old = crashed(monkeypatch, pretrain_settings(packed_folder, tmp_path / "elsewhere"), 5)
    young = crashed(monkeypatch, pretrain_settings(packed_folder, tmp_path / "run"), 5)
    for path in old:
        age(path, KEEP_DAYS + 0.1)
    for path, days in zip(young, (KEEP_DAYS - 0.1, KEEP_DAYS + 0.1), strict=True):
        age(path, days)
    capfd.readouterr()
    pretrain(pretrain_settings(packed_folder, tmp_path / "run", epochs=1))
    assert not old[0].parent.exists() and all(path.exists() for path in young)
    assert str(young[0]) in capfd.readouterr().out


# The file -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_full_disk_is_said(tmp_path):
    """A limit on the size of files stands in for the full disk: the system refuses in the same place."""
    code = (
        "import resource, torch; from simmimlib.train.resume import RollingCheckpoint\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "RollingCheckpoint({'a': 1}, 'run').save({'step': 1, 'x': torch.zeros(10_000)})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0
    assert "the checkpoint of 0.000 GB could not be written" in done.stderr and "GB are free there" in done.stderr
    assert not list(tmp_path.rglob("*.partial")) and not list(tmp_path.rglob("*.ckpt"))


def test_a_checkpoint_is_proven_before_an_older_one_goes(monkeypatch):
    rolling = RollingCheckpoint({"a": 1}, "run")
    for step in (1, 2):
        rolling.save({"step": step})
    monkeypatch.setattr(resume, "read", lambda path: (_ for _ in ()).throw(ValueError("unreadable")))
    with pytest.raises(ValueError, match="unreadable"):
        rolling.save({"step": 3})
    assert [path.stem[-1] for path in rolling.files()] == ["3", "2", "1"]


def test_saving_is_due_by_time_and_by_its_own_cost(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    rolling = RollingCheckpoint({"a": 1}, "run")

    def due(seconds):
        now[0] += seconds
        return rolling.due()

    assert [due(59.0), due(1.0)] == [False, True], "once a minute"
    write = rolling._write

    def slow(state):
        write(state)
        now[0] += 2.0  # seconds

    monkeypatch.setattr(rolling, "_write", slow)
    rolling.save({"step": 1})
    assert [due(61.0), due(138.0), due(1.0)] == [False, False, True], "a hundredth of the time"


def test_only_one_of_several_processes_writes():
    rolling = RollingCheckpoint({"a": 1}, "run")
    rolling.save({"step": 1}, writes=False)
    assert rolling.files() == [] and rolling.load() is None
    rolling.save({"step": 1})
    assert rolling.load() == {"step": 1}


def test_a_run_that_is_under_way_is_no_orphan(packed_folder):
    """Of the same `out`, with other settings, and training right now: neither named nor, however old, deleted."""
    other = RollingCheckpoint({"seed": 1}, "results/x")
    other.save({"step": 1})
    os.utime(other.files()[0], (0, 0))
    this = RollingCheckpoint({"seed": 2}, "results/x")
    with this.lock(), other.lock():
        assert list(this.orphans()) == [] and other.files()
    with this.lock():
        assert list(this.orphans()) == [] and not other.folder.exists()


def test_what_left_no_checkpoint_goes_too_when_it_is_old(packed_folder):
    other = RollingCheckpoint({"seed": 1}, "results/x")
    with other.lock():
        pass
    this = RollingCheckpoint({"seed": 2}, "results/x")
    with this.lock():
        assert list(this.orphans()) == [] and other.folder.exists()
        os.utime(other.folder, (0, 0))
        assert list(this.orphans()) == [] and not other.folder.exists()


def test_a_run_that_ends_meanwhile_is_no_orphan(packed_folder, monkeypatch):
    """It deletes its folder between the look at the list and the look at the folder."""
    other = RollingCheckpoint({"seed": 1}, "results/x")
    other.save({"step": 1})
    this = RollingCheckpoint({"seed": 2}, "results/x")
    found = resume.files

    def just_ended(folder):
        checkpoints = found(folder)
        if folder == other.folder:
            other.remove()
        return checkpoints

    monkeypatch.setattr(resume, "files", just_ended)
    with this.lock():
        assert list(this.orphans()) == [] and not other.folder.exists()
