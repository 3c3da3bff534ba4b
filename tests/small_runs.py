"""Settings of runs that take a second or two, and how to crash them (for the tests of train/ and machine/)."""

from pathlib import Path

import pytest

from conftest import TINY
from simmimlib.train import loop
from simmimlib.train.pretrain import pretrain
from simmimlib.train.settings import FinetuneSettings, PretrainSettings, ProbeSettings

CONVNEXT = {"patch_size": 1, "depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}
METHODS = {  # changes to `pretrain_settings`
    "simmim": {},
    "mae": {"method": "mae", "mask_ratio": 0.75, "loss": "l2", "beta2": 0.95},
    "fcmae": {
        "method": "fcmae",
        "encoder": "convnextv2_atto",
        "encoder_kwargs": CONVNEXT,
        "mask_patch_size": 8,
        "loss": "l2",
        "base_lr": 2.0,
    },
    "simmim on convolutions": {"encoder": "convnextv2_atto", "encoder_kwargs": CONVNEXT, "mask_patch_size": 8},
}


def pretrain_settings(packed, out, **changes):
    values = {"data": packed, "encoder_kwargs": TINY, "image_size": 16, "mask_patch_size": 4, "epochs": 15}
    values |= {"batch_size": 8, "base_lr": 0.2, "base_warmup_lr": 0.2, "crop_scale": 1.0, "out": str(out)}
    return PretrainSettings(**values | changes)


def finetune_settings(packed, out, **changes):
    values = {"data": packed, "encoder_kwargs": TINY, "image_size": 16, "labelled_images": 0, "epochs": 15}
    values |= {"batch_size": 8, "base_lr": 0.1, "base_warmup_lr": 0.1, "crop_scale": 1.0, "out": str(out)}
    return FinetuneSettings(**values | changes)


def probe_settings(packed, out, **changes):
    values = {"data": packed, "encoder_kwargs": TINY, "image_size": 16, "k": 3, "batch_size": 5, "out": str(out)}
    return ProbeSettings(**values | changes)


def watch_steps(monkeypatch, watcher):
    """Calls ``watcher(run, inputs)`` before each step that a run of this process computes; what it returns, if
    anything, takes the place of the inputs."""
    forward_backward = loop.forward_backward

    def watched(run, inputs, parts):
        return forward_backward(run, watcher(run, inputs) or inputs, parts)

    monkeypatch.setattr(loop, "forward_backward", watched)


def crashed(monkeypatch, settings, steps, run=pretrain) -> list[Path]:
    """The checkpoints, newest first, of a run that crashed after so many steps."""

    def crash(run, inputs):
        if run.step == steps:
            raise ZeroDivisionError("crash")

    folders = Path.cwd() / ".scratch/runs"
    before = set(folders.iterdir()) if folders.exists() else set()
    with monkeypatch.context() as patch:
        watch_steps(patch, crash)
        with pytest.raises(ZeroDivisionError):
            run(settings)
    (folder,) = set(folders.iterdir()) - before
    return sorted(folder.glob("*.ckpt"), reverse=True)
