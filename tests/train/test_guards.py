"""What goes wrong is said."""

import io
from pathlib import Path

import pandas as pd
import pytest
import torch

from simmimlib.data.batches import training_batches
from simmimlib.data.packed import open_packed
from simmimlib.train import loop
from simmimlib.train.pretrain import pretrain
from simmimlib.train.resume import read
from simmimlib.train.run import Objective
from small_runs import pretrain_settings, watch_steps


def poison(monkeypatch, steps):
    """Makes the loss of these steps not a number, each time they are computed."""
    watch_steps(monkeypatch, lambda run, inputs: (inputs[0] * float("nan"), *inputs[1:]) if run.step in steps else None)


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
    data = open_packed(packed_folder)
    rows = training_batches(settings, data.train, data, torch.device("cpu")).rows(3)[0]
    assert f"rows {', '.join(map(str, rows.tolist()))} of the training images" in message
    assert "start the run again with skip_nonfinite = 1 to resume from it without that batch" in message
    kept = Path(message.rpartition("The last good checkpoint is ")[2].partition(": start")[0])
    state = torch.load(io.BytesIO(read(kept)), weights_only=True)
    assert state["step"] == 6 and all(tensor.isfinite().all() for tensor in state["model"].values())

    # the same run, asked to leave such batches out, resumes from there
    metrics = pretrain(pretrain_settings(packed_folder, tmp_path / "run", skip_nonfinite=1))
    log = pd.read_csv(tmp_path / "run/log.csv")
    assert metrics["skipped_steps"] == 1 and log["skipped"].tolist() == [0] * 3 + [1] * 12
    assert log["loss"].notna().all() and metrics["loss"] < 0.7 * log["loss"][0]


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path, packed_folder, often, monkeypatch):
    forward_backward = loop.forward_backward

    def overflowing(run, inputs, parts):
        loss = forward_backward(run, inputs, parts)
        if run.step == 3:
            next(run.model.parameters()).grad.fill_(float("inf"))
        return loss

    monkeypatch.setattr(loop, "forward_backward", overflowing)
    with pytest.raises(FloatingPointError, match=r"the loss is 0\.\d+ and the norm of the gradient inf at step 3 "):
        pretrain(pretrain_settings(packed_folder, tmp_path / "run"))


def test_more_bad_batches_than_allowed(tmp_path, packed_folder, often, monkeypatch):
    poison(monkeypatch, {3, 8, 13})
    with pytest.raises(FloatingPointError, match=r"at step 13 .* skip_nonfinite = 3 to resume"):
        pretrain(pretrain_settings(packed_folder, tmp_path / "run", skip_nonfinite=2))


def test_skipping_goes_back_to_the_last_checkpoint(tmp_path, packed_folder, monkeypatch, capfd):
    """However far that is: with the loss looked at once an epoch the weights are spoilt long before it is seen."""
    poison(monkeypatch, {4})
    metrics = pretrain(pretrain_settings(packed_folder, tmp_path / "run", skip_nonfinite=1))
    assert metrics["skipped_steps"] == 1 and metrics["val_loss"] > 0
    assert metrics["images_seen"] == 15 * 16, "without those that were seen again"
    assert "Going back to step 0, to leave that batch out" in capfd.readouterr().out


def test_a_step_that_is_left_out_counts_in_no_mean(tmp_path, packed_folder, often, monkeypatch):
    """The epoch's loss is then that of its other step."""
    poison(monkeypatch, {6})
    losses = {}
    forward_backward = loop.forward_backward

    def noted(run, inputs, parts):
        loss = forward_backward(run, inputs, parts)
        losses[run.step] = loss.item()
        return loss

    monkeypatch.setattr(loop, "forward_backward", noted)
    pretrain(pretrain_settings(packed_folder, tmp_path / "run", skip_nonfinite=1, epochs=5))
    log = pd.read_csv(tmp_path / "run/log.csv")
    assert log["loss"][3] == pytest.approx(losses[7], rel=1e-6)
    assert log["loss"][2] == pytest.approx((losses[4] + losses[5]) / 2, rel=1e-6)


def test_out_of_memory_says_what_fits(tmp_path, packed_folder, monkeypatch):
    forward = Objective.forward

    def full(self, *inputs):
        if len(inputs[0]) > 3:
            raise torch.OutOfMemoryError("tried to allocate")
        return forward(self, *inputs)

    monkeypatch.setattr(Objective, "forward", full)
    settings = pretrain_settings(packed_folder, tmp_path / "run", epochs=2)
    with pytest.raises(torch.OutOfMemoryError, match=r"8 images a step on cpu do not fit; 2 at a time do: set .*=2"):
        pretrain(settings)
    monkeypatch.setenv("SIMMIM_MICRO_BATCH", "2")
    assert pretrain(settings)["images_seen"] == 32


def test_out_of_memory_with_a_single_image(tmp_path, packed_folder, monkeypatch):
    def full(self, *inputs):
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(Objective, "forward", full)
    with pytest.raises(torch.OutOfMemoryError, match="not even one image at a time fits into the memory of cpu"):
        pretrain(pretrain_settings(packed_folder, tmp_path / "run", epochs=1))
