"""The training loop: which steps it takes."""

import functools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from simmimlib.data.batches import training_batches
from simmimlib.data.packed import open_packed
from simmimlib.data.streams import WEIGHTS, seed_globals
from simmimlib.machine.device import compiles
from simmimlib.train.finetune import finetune
from simmimlib.train.optim import parameter_groups
from simmimlib.train.pretrain import pretrain
from small_runs import finetune_settings, pretrain_settings, watch_steps

SMALL_SWIN = {"patch_size": 2, "window_size": 4, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4)}
CPU = torch.device("cpu")


def test_the_loop_is_a_plain_one_written_out(tmp_path, packed_folder):
    """AdamW, gradients clipped, a cosine with warm-up by the step, each epoch in an order of its own."""
    changes = {"epochs": 5, "batch_size": 4, "crop_scale": 0.5, "flip": True, "clip_grad": 0.3}
    changes |= {"base_warmup_lr": 0.01, "base_min_lr": 0.02, "warmup_epochs": 1.5}
    settings = pretrain_settings(packed_folder, tmp_path / "run", **changes)
    pretrain(settings)

    data = open_packed(packed_folder)
    seed_globals(CPU, settings.seed, WEIGHTS)
    model = settings.model(3, data.mean, data.std)
    batches = training_batches(settings, data.train, data, CPU, settings.masks(4))
    groups = parameter_groups(model, 1.0, settings.weight_decay, pretraining=True)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    scale, step, rows, clipped = 4 / 512, 0, [], 0
    for epoch in range(5):
        losses, norms = [], []
        for images, masks in batches.epoch(epoch):
            rate = 0.02 + (0.2 - 0.02) * (1 + math.cos(math.pi * step / 20)) / 2
            rate = 0.01 + (0.2 - 0.01) * step / 6 if step < 6 else rate
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
            optimizer.zero_grad()
            loss = model(images, masks).loss
            loss.backward()
            norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.parameters()]))
            clipped += norm > 0.3
            for parameter in model.parameters():
                parameter.grad *= (0.3 / (norm + 1e-6)).clamp(max=1)
            optimizer.step()
            losses.append(loss.item())
            norms.append(norm.item())
            step += 1
        rows.append([epoch + 1, sum(losses) / 4, sum(norms) / 4, rate * scale, 0])
    assert clipped > 0, "so that clipping has a say"
    np.testing.assert_allclose(pd.read_csv(tmp_path / "run/log.csv").values, rows, rtol=1e-4)
    saved = load_file(tmp_path / "run/model.safetensors")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-3, atol=1e-5)


def test_same_seed_same_numbers(tmp_path, packed_folder):
    first, again, other = (
        pretrain(pretrain_settings(packed_folder, tmp_path / name, epochs=2, seed=seed, crop_scale=0.67, flip=True))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first["loss"] == again["loss"] and first["val_loss"] == again["val_loss"] != other["val_loss"]
    assert (tmp_path / "a/log.csv").read_text() == (tmp_path / "b/log.csv").read_text()


def test_drop_path_is_drawn_anew_in_each_step(tmp_path, packed_folder, monkeypatch):
    """And is the same for the same step of a seed, whatever was drawn before it."""
    drawn = {}
    for name in ("a", "b"):
        seen = drawn.setdefault(name, [])
        with monkeypatch.context() as patch:
            watch_steps(patch, lambda run, inputs, seen=seen: seen.append(torch.get_rng_state()))
            # validating draws nothing that the next step would notice
            on_epoch = (lambda rows: torch.rand(3)) if name == "b" else None
            finetune(finetune_settings(packed_folder, tmp_path / name, epochs=3, drop_path=0.5), on_epoch)
    assert len(drawn["a"]) == 6
    assert len({tuple(state.tolist()) for state in drawn["a"]}) == 6
    assert all(one.equal(other) for one, other in zip(drawn["a"], drawn["b"], strict=True))


def test_every_step_is_in_training_mode(tmp_path, packed_folder, monkeypatch):
    """Also after a validation, which puts the model into evaluation mode."""
    modes = []
    watch_steps(monkeypatch, lambda run, inputs: modes.append(run.model.training))
    finetune(finetune_settings(packed_folder, tmp_path / "run", epochs=3, eval_epochs=1))
    assert modes == [True] * 6


def test_accumulation_gives_the_same_curve(tmp_path, packed_folder, monkeypatch):
    for name, part in (("whole", "8"), ("parts", "3")):
        monkeypatch.setenv("SIMMIM_MICRO_BATCH", part)
        pretrain(pretrain_settings(packed_folder, tmp_path / name))
    whole, parts = (pd.read_csv(tmp_path / name / "log.csv") for name in ("whole", "parts"))
    torch.testing.assert_close(torch.tensor(parts.values), torch.tensor(whole.values), rtol=1e-4, atol=1e-5)
    monkeypatch.setenv("SIMMIM_MICRO_BATCH", "half")
    with pytest.raises(ValueError, match="SIMMIM_MICRO_BATCH = 'half': must be a number above 0"):
        pretrain(pretrain_settings(packed_folder, tmp_path / "whole"))


def test_no_more_images_at_a_time_than_allowed(tmp_path, packed_folder, monkeypatch):
    counts = []
    monkeypatch.setenv("SIMMIM_MICRO_BATCH", "3")
    monkeypatch.setattr(
        "simmimlib.train.pretrain.masked_loss",
        lambda model, images, masks: counts.append(len(images)) or model(images, masks).loss,
    )
    pretrain(pretrain_settings(packed_folder, tmp_path / "run", epochs=1))
    assert counts == [3, 3, 2, 3, 3, 2]


def test_bfloat16_is_a_little_rougher(tmp_path, packed_folder):
    """The model in bfloat16, its weights and the log in float32."""
    fine, rough = (
        pretrain(pretrain_settings(packed_folder, tmp_path / precision, epochs=3, precision=precision))
        for precision in ("float32", "bfloat16")
    )
    assert rough["precision"] == "bfloat16" and fine["loss"] != rough["loss"]
    assert rough["loss"] == pytest.approx(fine["loss"], rel=0.05)
    weights = load_file(tmp_path / "bfloat16/model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())


@pytest.mark.slow
@pytest.mark.parametrize("encoder", [{}, {"encoder": "swin_tiny_patch4_window7_224", "encoder_kwargs": SMALL_SWIN}])
def test_a_compiled_step_is_the_same_step(tmp_path, packed_folder, monkeypatch, encoder):
    """The whole step is one graph (`fullgraph`), whatever backend then makes code of it."""
    changes = {"epochs": 3, "drop_path": 0.0, "mask_patch_size": 8} | encoder
    pretrain(pretrain_settings(packed_folder, tmp_path / "plain", **changes))
    monkeypatch.setenv("SIMMIM_COMPILE", "1")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    pretrain(pretrain_settings(packed_folder, tmp_path / "compiled", **changes))
    plain, compiled = (pd.read_csv(tmp_path / name / "log.csv").values for name in ("plain", "compiled"))
    np.testing.assert_allclose(compiled, plain, rtol=1e-4)
    finetune(finetune_settings(packed_folder, tmp_path / "fine", epochs=1, mixup=0.8))


def test_compilation_can_be_decided(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [compiles(cpu, 10**6), compiles(gpu, 10), compiles(gpu, 10**6)] == [False, False, True]
    monkeypatch.setenv("SIMMIM_COMPILE", "0")
    assert not compiles(gpu, 10**6)
    monkeypatch.setenv("SIMMIM_COMPILE", "yes")
    with pytest.raises(ValueError, match="SIMMIM_COMPILE = 'yes': must be one of 0, 1"):
        compiles(gpu, 1)
