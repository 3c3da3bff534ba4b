import os

import pytest
import torch

from simmimlib.machine.device import cores, own_gpu, pick_device, resolve_precision


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bfloat16_only_where_the_gpu_has_it(monkeypatch, native, expected):
    """Older GPUs emulate it, slower than float32."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: asked.append(options) or native)
    assert resolve_precision("auto", torch.device("cuda")) == expected
    assert asked == [{"including_emulation": False}]
    assert resolve_precision("auto", torch.device("cpu")) == torch.float32


def test_a_gpu_that_is_named_becomes_the_current_one(monkeypatch):
    """Its generator is then the one that is seeded."""
    chosen = []
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    for name in ("cuda:1", "cuda", "cpu"):
        monkeypatch.setenv("SIMMIM_DEVICE", name)
        assert pick_device() == torch.device(name)
    assert chosen == [1]


@pytest.mark.parametrize(("visible", "index"), [(8, 5), (1, 0)])
def test_a_process_that_sees_only_its_own_gpu_takes_it(monkeypatch, visible, index):
    """``srun --gpus-per-task=1`` shows each process one, which is number 0 to it."""
    monkeypatch.setenv("LOCAL_RANK", "5")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: visible)
    assert own_gpu(torch.device("cuda")) == torch.device("cuda", index)


@pytest.mark.parametrize(
    ("processes", "allowed", "expected"),
    [(1, 128, 128), (8, 128, 16), (8, 8, 8), (8, 4, 4), (1, 1, 1), (256, 128, 1)],
)
def test_cores_are_those_that_a_process_may_use(monkeypatch, processes, allowed, expected):
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(allowed)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert cores() == expected
